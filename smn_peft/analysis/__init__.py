# SPDX-License-Identifier: Apache-2.0
"""What trained masks look like: compression, density, similarity."""
