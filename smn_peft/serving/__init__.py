# SPDX-License-Identifier: Apache-2.0
"""A bank behind HTTP: predictions and embeddings of any of its tasks. Needs the extra ``serve``."""
