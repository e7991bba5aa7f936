# SPDX-License-Identifier: Apache-2.0
"""Pure functions on tensors: masks, effective weights and bit packing. No modules, no PEFT, no files."""
