# SPDX-License-Identifier: Apache-2.0
"""A task whose answer is known: remembering bits."""
