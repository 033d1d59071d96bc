"""
The page of ``sb3-clipvf report RUNS``: runs as their files show them, compared by settings and seeds.

Reading:

- ``records``: runs in folders, and what their files hold;
- ``training``: episodes, log, clock and model of a run, from all of its files;
- ``series``: quantities of a run over its training.

Comparing:

- ``groups``: runs that differ only in their seeds;
- ``curves``: means and spreads over seeds;
- ``summary``: tables of numbers;
- ``titles``: titles, units and order of quantities.

Writing:

- ``page``: the page in HTML;
- ``sections``: its tables, videos and commands;
- ``train_commands``: commands that repeat the training of a run;
- ``figure``: learning curves as a figure;
- ``outputs``: the files of a report.
"""
