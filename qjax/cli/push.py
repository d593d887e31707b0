"""The command that uploads what was made: push."""

import argparse

from qjax.cli.arguments import Commands, add_json
from qjax.errors import QjaxError


def add(commands: Commands) -> None:
    """Its arguments."""
    sub = commands.add(
        "push",
        "Upload a saved model to the Hugging Face Hub, by the token in HF_TOKEN or of `hf auth login`.",
        "qjax push out owner/name --private --message 'w4g128 by GPTQ'",
        _push,
        model=False,
        compiles=False,
    )
    sub.add_argument("folder", help="a folder, or a GGUF file, that qjax wrote")
    sub.add_argument("repo", help="owner/name; made if there is none")
    sub.add_argument("--private", action="store_true", help="of a repository that is made")
    sub.add_argument("--revision", metavar="BRANCH", help="a branch that is there; default: main")
    sub.add_argument("--message", metavar="TEXT", help="of the commit")
    add_json(sub)


def _push(args: argparse.Namespace) -> None:
    # What `qjax.push_to_hub` does with a folder, without waiting for JAX.
    from qjax.formats.push import push_folder
    from qjax.runs.console import emit, emit_json

    repo = args.repo
    if args.revision is not None:
        if "@" in repo:
            raise QjaxError(f"{repo}: names a branch already: leave it or --revision out")
        repo = f"{repo}@{args.revision}"
    url = push_folder(args.folder, repo, private=args.private, message=args.message)
    if args.json:
        emit_json({"path": args.folder, "repo": repo, "url": url})
    else:
        emit(url, "\n")
