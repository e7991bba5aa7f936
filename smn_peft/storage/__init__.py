# SPDX-License-Identifier: Apache-2.0
"""Adapters as bytes: checked when they are read, written whole or not at all, tied to a base by its fingerprint."""
