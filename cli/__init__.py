"""The `seqmix` program: app.py has the table of commands, commands/ one file per command.

options, console, output, progress, results   shared by commands: options, notes, errors and escapes, bars, --json
check_output, evaluation_tables, study_progress   what `check`, `evaluate` and the studies print
pytest_plugin   options of pytest; here because testing/ would import torch into every pytest run
"""
