# SPDX-License-Identifier: Apache-2.0
"""Thousands of masks over one base: switched in place, served in mixed batches, kept in one store."""
