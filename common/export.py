"""What a run leaves behind: model card, and the way to the hub."""

import json
import shlex
import sys
from pathlib import Path


def write_model_card(
    folder: Path, *, title: str, tags: list[str], usage: str, settings: dict, results: str, picture: str
):
    """README.md with how to use the model, what made it, and what came out."""
    command = shlex.join(["accelerate", "launch", *hide_secrets(sys.argv)])
    # Of the data the flags alone: shards and files may be thousands of lines.
    hidden = ("hub_token", "datasets", "notes", "webhook")
    shown = {key: value for key, value in sorted(settings.items()) if key not in hidden}
    base = settings["pretrained_teacher_model"]
    # A hub's base_model is owner/name; a folder of this machine is nobody else's business.
    base_model = f"base_model: {base}\n" if not Path(base).exists() else ""
    (folder / "README.md").write_text(
        f"---\nlibrary_name: diffusers\n{base_model}tags: {json.dumps(tags)}\n---\n\n# {title}\n\n"
        f"![samples]({picture})\n\n## Use\n\n```python\n{usage}```\n\n{results}"
        f"## Training\n\n```bash\n{command}\n```\n\n```json\n{json.dumps(shown, indent=2, default=str)}\n```\n"
    )


def hide_secrets(argv: list[str]) -> list[str]:
    hidden, secret = [], False
    for word in argv:
        name, equals, _ = word.partition("=")
        is_token = name.startswith("--hub_t")  # argparse takes abbreviations
        hidden.append("***" if secret else f"{name}=***" if equals and is_token else word)
        secret = is_token and not equals
    return hidden


def create_hub_repository(args) -> str:
    """Before training, so that a missing login or network is known before hours of work."""
    from huggingface_hub import create_repo

    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        return create_repo(name, token=args.hub_token, private=True, exist_ok=True).repo_id
    except Exception as error:
        raise SystemExit(
            f"--push_to_hub: cannot create {name} on the hub ({error}). Log in with `hf auth login`."
        ) from None


def push_to_hub(args, repository: str, files: list[str], message: str, fatal: bool = True):
    """The named files and folders of the output folder, and nothing else of it."""
    from huggingface_hub import upload_folder

    patterns = [f"{name}/*" if Path(args.output_dir, name).is_dir() else name for name in files]
    try:
        upload_folder(
            repo_id=repository, folder_path=args.output_dir, allow_patterns=patterns, token=args.hub_token,
            commit_message=message,
        )  # fmt: skip
    except Exception as error:  # a hub that is away for a while must not end the training
        if fatal:
            raise
        print(f"--push_checkpoints_to_hub: {message} was not uploaded ({error})")
