"""Payloads by content: updates, snapshots, changes, materials. Free of torch.

A blob is bytes in chunks of 4 MiB; its id is the hash of its manifest, which lists the hashes of the chunks.
So any chunk can be fetched from any holder, checked by itself, and fetched again, and nothing needs to be
trusted.

    manifest.py   what a blob is
    store.py      blobs on a disk
    routes.py     a store over HTTP
    holders.py    one holder as a client sees it: requests, answers, faults, patience
    transfer.py   upload and download
"""
