"""Hugging Face Llama 4 checkpoints: read, imported and exported, exactly.

table.py     the one bijection between the two layouts
files.py     safetensors files
config.py    config.json
load.py      a directory as a model, onto devices
importer.py  a directory to a checkpoint of ours
exporter.py  and back
"""
