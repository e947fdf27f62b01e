"""Weights from a hub (Hugging Face's HTTP API) in the cache that all engines read: `python -I -m mmd.hub.fetch`.

A client of its own instead of huggingface_hub of the model's environment: whoever may name an environment could run a program
of theirs as the user that owns the weights of all models. The cache is laid out as huggingface_hub does
(https://huggingface.co/docs/huggingface_hub/guides/manage-cache), which finds everything in it without asking the hub:

    hub/models--ORG--NAME/blobs/ETAG                 a file: its SHA-256, or the SHA-1 that git knows it by
    hub/models--ORG--NAME/snapshots/COMMIT/PATH      a link to it
    hub/models--ORG--NAME/refs/REVISION              the commit of a branch
"""
