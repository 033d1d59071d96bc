"""
Read and write models and statistics, atomically and without running code from a file.

- ``model``: files of models;
- ``statistics``: files of ``VecNormalize`` statistics;
- ``archive``: files and zips, with limits and errors;
- ``atomic``: atomic writes;
- ``codec``: plain values and attributes of models as JSON;
- ``unpickle``: pickles, without running code;
- ``allowlist``: classes and functions that a file may name;
- ``trust``: ``trust_pickle``.
"""
