"""`davinci convert release` and `push`: a run's kept checkpoints as folders, and folders as revisions on the hub."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from megatron_davinci.errors import CheckpointError, ConfigError, DavinciError, EnvironmentProblem
from megatron_davinci.files import write_json

REVISIONS = "revisions.json"


def add_release_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `release`."""
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("out", type=Path, help="folder for one folder a checkpoint, and revisions.json")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer (default: the run's)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    parser.add_argument("--family", help="write them as this family (default: by the model)")
    parser.add_argument("--licence", metavar="ID", help="for the model cards, such as apache-2.0")
    parser.add_argument("--skip-verify", action="store_true", help="do not hold them against transformers")


def add_push_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `push`."""
    parser.add_argument("folder", type=Path, help="what to-hf or release has made")
    parser.add_argument("repository", help="NAME/MODEL on the hub; it is made if it is not there")
    parser.add_argument(
        "--token-file", type=Path, help="file with your token (default: the variable HF_TOKEN)"
    )
    parser.add_argument("--private", action="store_true", help="make the repository a private one")
    parser.add_argument("--revision", default="main", help="branch, for a single folder (default: main)")


def release(arguments: argparse.Namespace) -> int:
    """Export every checkpoint that a run has kept, the newest first; those that are there already are left."""
    from megatron_davinci.cli.convert_to_hf import export
    from megatron_davinci.convert.origin import is_of_another
    from megatron_davinci.train import checkpoint_files

    steps = checkpoint_files.steps(arguments.run / "checkpoints")
    if not steps:
        raise ConfigError(
            "The run has no checkpoint.",
            where=arguments.run / "checkpoints",
            do="check the run directory's path",
        )
    found, problems = [], []
    for folder in steps:
        target = arguments.out / folder.name
        step = int(folder.name.removeprefix("step-"))
        try:
            if not target.exists():
                export(
                    f"{arguments.run}@{step}",
                    target,
                    dtype=arguments.dtype,
                    tokenizer=arguments.tokenizer,
                    family=arguments.family,
                    verify=not arguments.skip_verify,
                    licence=arguments.licence,
                )
            elif is_of_another(target, checkpoint_files.read(folder, verify=False).manifest):
                raise CheckpointError(
                    "An export that is there was made of another checkpoint of this step.",
                    where=target,
                    found="the run turned back, or was trained anew, and has saved the step again",
                    do="remove that folder, or name another one to release to",
                )
            manifest = json.loads((target / "training_manifest.json").read_bytes())
            _check_written_so(target, manifest, arguments.dtype, arguments.family)
            tokens = manifest["checkpoint"]["consumed_tokens"]
        except (DavinciError, OSError, ValueError, KeyError, TypeError) as error:
            problems.append(f"{folder.name}: {error if isinstance(error, DavinciError) else repr(error)}")
            continue
        found.append({"revision": f"step{step}", "folder": folder.name, "step": step, "tokens": tokens})
        print(target)
    if found:
        # The newest is what one gets who asks for no revision.
        revisions = [{**found[0], "revision": "main"}, *found]
        write_json(arguments.out / REVISIONS, revisions)
    if problems:
        raise EnvironmentProblem(
            "Not every checkpoint could be exported.",
            where=arguments.out,
            found="\n".join(problems),
            do="mend what is said, and start the same command again: it goes on with those that are missing",
        )
    return 0


def _check_written_so(target: Path, manifest: dict[str, Any], dtype: str | None, family: str | None) -> None:
    """Refuse a folder that is there and was written in another way than is asked for now."""
    from megatron_davinci.convert.export import read_config

    written = {"--dtype": read_config(target).get("torch_dtype"), "--family": manifest["family"]}
    asked = {"--dtype": dtype, "--family": family}
    differing = [
        f"{name}: {was}, not {asked[name]}" for name, was in written.items() if asked[name] not in (None, was)
    ]
    if differing:
        raise CheckpointError(
            "An export that is there was written otherwise.",
            where=target,
            found="\n".join(differing),
            do="remove that folder, or name another one to release to",
        )


def push(arguments: argparse.Namespace) -> int:
    """Upload."""
    token = _token(arguments.token_file)
    for one in upload(
        arguments.folder,
        arguments.repository,
        _api(token),
        private=arguments.private,
        revision=arguments.revision,
    ):
        print(one)
    return 0


def upload(
    folder: Path, repository: str, api: Any, *, private: bool = False, revision: str = "main"
) -> list[str]:
    """Upload a folder, or each of a release as its revision.

    All folders are checked before anything is uploaded: config, and every tensor that the index names.

    Args:
        folder: What `to-hf` or `release` has made.
        repository: `NAME/MODEL`.
        api: A `huggingface_hub.HfApi` with a token.
        private: For a repository that is not there yet.
        revision: Branch, for a single folder.

    Returns:
        A line for each revision.

    Raises:
        CheckpointError: A folder is no whole model, or the list of revisions is none.
        ConfigError: The repository's name is none.
        EnvironmentProblem: The hub refused.
    """
    from megatron_davinci.convert.export import read_config
    from megatron_davinci.convert.tensor_files import Tensors

    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ConfigError(
            "This is no repository's name.", where="push", found=repository, expected="NAME/MODEL"
        )
    revisions = [(revision, folder)]
    if (folder / REVISIONS).exists():
        try:
            listed = json.loads((folder / REVISIONS).read_bytes())
            revisions = [(str(one["revision"]), folder / one["folder"]) for one in listed]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                "A release's list of revisions cannot be read.",
                where=folder / REVISIONS,
                found=f"{type(error).__name__}: {error}",
                expected="a list of objects with revision and folder",
                do="start the same davinci convert release again: it writes the list anew",
            ) from error
    for _, one in revisions:
        read_config(one)
        Tensors(one)
    said = []
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        for name, one in revisions:
            if name != "main":
                api.create_branch(repository, branch=name, exist_ok=True)
            api.upload_folder(
                repo_id=repository,
                folder_path=str(one),
                revision=name,
                commit_message=f"Upload {one.name}",
                ignore_patterns=[".*"],
            )
            said.append(f"{repository}@{name}: {one}")
    except Exception as error:  # whatever the library and the network raise
        raise EnvironmentProblem(
            "The hub did not take the upload.",
            where=repository,
            found=f"{type(error).__name__}: {error}",
            expected=f"{len(revisions)} revisions, of which {len(said)} are up",
            do="check the token's rights and the network, and start the same command again",
        ) from error
    return said


def _token(path: Path | None) -> str:
    token = path.read_text().strip() if path is not None and path.is_file() else os.environ.get("HF_TOKEN")
    if not token or (path is not None and not path.is_file()):
        raise ConfigError(
            "There is no token to upload with.",
            where=path or "HF_TOKEN",
            found="nothing",
            expected="a token of the hub that may write",
            do="set HF_TOKEN, or name a file with --token-file",
        )
    return token


def _api(token: str) -> Any:
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise EnvironmentProblem(
            "huggingface_hub is not installed.", found=error, do="pip install 'megatron-davinci[eval]'"
        ) from error
    return HfApi(token=token)
