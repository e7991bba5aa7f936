# SPDX-License-Identifier: Apache-2.0
"""Masks coded to about their entropy: the cheapest of four codes per layer, all layers in one blob of bytes."""
