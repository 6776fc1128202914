"""The subcommands of `equipoise`: parse, call, print. What a command does is in the room that it calls."""
