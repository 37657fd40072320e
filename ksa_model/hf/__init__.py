"""Hugging Face interop: tensor names and configurations both ways, and the files an exported model brings along.

`naming` and `configs` are pure: no files, no transformers. `modeling_ksa.py` and `tokenization_ksa.py` are copied into
an export as they stand and import nothing of this project.
"""
