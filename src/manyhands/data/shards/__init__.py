"""Shards: data made ahead, as Parquet files of fixed-size rows and a manifest that says all of them.

    DIR/manifest.json             manifest.py: task, columns, files, row groups, hashes, how they were made
    DIR/materials/                what the task needs beside the rows: tokenizer, statistics, ...
    DIR/training-00000.parquet    writer.py; one series of files for each set of the task
    DIR/.making/                  making.py: only while they are being made

Read by reader.py in the order of order.py; checked by verify.py; put together by merge.py. No torch here: what the
rows are is the business of whoever makes them (tasks/packing.py).
"""
