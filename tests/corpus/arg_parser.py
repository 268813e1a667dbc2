"""A tool with subcommands, as a script has it. Without arguments it does what a notebook does."""

# %%
import argparse
import sys


def build():
    parser = argparse.ArgumentParser(prog="tool", description="Counts things.")
    parser.add_argument("--verbose", "-v", action="count", default=0)
    commands = parser.add_subparsers(dest="command")
    count = commands.add_parser("count", help="count words")
    count.add_argument("words", nargs="*")
    count.add_argument("--at-least", type=int, default=1, metavar="N")
    return parser


# %%
options = build().parse_args(sys.argv[1:])
print(options)
print(build().parse_args("-vv count a bb ccc --at-least 2".split()))
print(build().format_usage().strip())

# %%
try:
    build().parse_args(["count", "--at-least", "many"])
except SystemExit as error:
    print("exit status", error.code)

# %%
sys.exit(0)
