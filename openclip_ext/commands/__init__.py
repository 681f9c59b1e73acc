"""The subcommands, one module each: `HELP`, `add_arguments(parser)`, `run(args) -> exit code`.

torch and all that is slow to import is imported inside `run`.
"""
