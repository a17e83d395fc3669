"""Subclasses of upstream's attention processors that fuse the norm and rotation of q and k.

Each replaces that alone and calls upstream's attention with upstream's class attributes, so that
``set_attention_backend`` and context parallelism keep working. They import upstream, hence each
lives in a module of its own that is loaded when a model of its family is patched or unpickled.
"""
