"""Hugging Face interoperability: configurations and tensor names in both directions, and the code of exported models.

`configs` and `naming` are pure: they read no files and do not import transformers. `modeling_ksa.py` and
`tokenization_ksa.py` are copied into every export unchanged, so they import nothing from this project.
"""
