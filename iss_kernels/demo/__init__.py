# SPDX-License-Identifier: Apache-2.0
"""The whole job on real text, as `python -m iss_kernels demo` runs it: learn, shrink, check, time.

text.py loads words, model.py is the language model, training.py the recipe and its loop, run.py the
phases in their order, show.py what the terminal sees, report.py and figures.py the HTML report.
"""
