"""
Checks during training, and what is reported when it fails.

- ``failures``: errors that end a run: a last checkpoint, and notes on how to resume;
- ``diagnosis``: non-finite numbers: which one, why, and a file with its arrays;
- ``env_checks``: environments that do not fit the model, observations of wrong shapes;
- ``workers``: worker processes that die;
- ``agreement``: processes of one run that differ.
"""
