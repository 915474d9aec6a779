"""The Hub repository of a checkpoint, and its push in one commit."""

import re
import tempfile
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import AutoModelForAudioClassification

from feature_extraction import ASTFeatureExtractor
from modeling_ast import ASTAudioClassificationPipeline

from .cards import ENDING, check_card, write_model_card

_TOKENS_PAGE = "https://huggingface.co/settings/tokens"


def write_repository(
    folder: Path, target: Path, repo_id: str, with_pipeline: bool = False
) -> list[Path]:
    """Write everything a checkpoint's Hub repository should contain into an empty folder.

    The card is written from the run's files, if there are any and nobody has edited it. A card
    without its run is kept, with the repository's name in its examples.

    Args:
        folder: a run folder, with the checkpoint in `checkpoint/`, or a checkpoint folder.
        target: the folder to write.
        repo_id: the repository's name, for the card's examples.
        with_pipeline: also add the pipeline's code and its `custom_pipelines` entry.

    Returns:
        The files, relative to `target`.

    Raises:
        ValueError: if something is missing in the checkpoint, or its card breaks the Hub's rules.
    """
    checkpoint = folder / "checkpoint" if (folder / "checkpoint").is_dir() else folder
    for name, purpose in (
        ("config.json", "the model's shape and label names"),
        ("preprocessor_config.json", "the statistics it was trained with"),
    ):
        if not (checkpoint / name).is_file():
            raise ValueError(f"{checkpoint} is not a complete checkpoint: no {name} ({purpose}).")
    # Our classifier or detector, whatever code comes with the folder.
    model, report = AutoModelForAudioClassification.from_pretrained(
        checkpoint, output_loading_info=True, trust_remote_code=False
    )
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ValueError(f"The weights in {checkpoint} are incomplete: {missing} … are missing.")
    extractor = ASTFeatureExtractor.from_pretrained(checkpoint)
    if with_pipeline:
        classifier = ASTAudioClassificationPipeline(model=model, feature_extractor=extractor)
        classifier.save_pretrained(target, with_code=True)
    else:
        model.config.__dict__.pop("custom_pipelines", None)
        model.save_pretrained(target)
        extractor.save_pretrained(target)

    card = checkpoint / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ENDING
    is_in_run = (checkpoint.parent / "arguments.yaml").is_file()
    # Rewritten if its source files are there; otherwise kept, because it says more.
    if ENDING in text and (is_in_run or not card.is_file()):
        write_model_card(checkpoint.parent if is_in_run else checkpoint, target, repo_id)
    else:
        check_card(text)
        title = next((line[2:] for line in text.splitlines() if line.startswith("# ")), "")
        text = text.replace(f'"{title}"', f'"{repo_id}"') if title else text
        (target / "README.md").write_text(text, encoding="utf-8")
        for picture in checkpoint.glob("*.png"):
            if f"({picture.name})" in text:
                (target / picture.name).write_bytes(picture.read_bytes())
    return sorted(path.relative_to(target) for path in target.rglob("*") if path.is_file())


def push(folder: Path, repo_id: str, private: bool = False, with_pipeline: bool = False) -> str:
    """Push a run's or a folder's checkpoint to the Hub in one commit.

    Returns:
        The commit's address; its last part is the revision to pin.

    Raises:
        ValueError: if the checkpoint or the name is not allowed, the token is missing or refused,
            or the Hub's answer is not as expected. The Hub is then unchanged: a repository created
            for this push is deleted again.
    """
    check_name(repo_id)
    token = get_token()
    if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
        raise ValueError("The token has characters that tokens never have: copy it again.")
    with tempfile.TemporaryDirectory(prefix="ast_push_") as temporary:
        target = Path(temporary)
        files = write_repository(folder, target, repo_id, with_pipeline)
        for file in files:
            if token and token.encode() in (target / file).read_bytes():
                raise ValueError(f"{file} contains your token. Remove it: it would become public.")
        api = HfApi()
        is_new = False
        try:
            if "/" not in repo_id:
                repo_id = f"{api.whoami()['name']}/{repo_id}"
            is_new = _create(api, repo_id, private)
            if private and not api.model_info(repo_id).private:
                raise ValueError(
                    f"{repo_id} exists and is public; --private does not change that. Choose "
                    "another name, or make it private in its settings first."
                )
            # Not upload_folder: with hf_xet installed, it makes several commits.
            commit = api.create_commit(
                repo_id,
                [CommitOperationAdd(str(file), target / file) for file in files],
                commit_message="Upload AST with ast-push-to-hub",
            )
        except ValueError as error:
            raise ValueError(_without(token, str(error))) from None
        except Exception as error:  # of whatever HTTP library huggingface_hub uses
            message = _explain(error, repo_id)
            if is_new:
                message += _take_back(api, repo_id)
            raise ValueError(_without(token, message)) from None
    return commit.commit_url


def _create(api: HfApi, repo_id: str, private: bool) -> bool:
    """Create the repository; False if it exists."""
    try:
        api.create_repo(repo_id, private=private or None)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        return False
    return True


def _take_back(api: HfApi, repo_id: str) -> str:
    """Delete the repository that this push created; returns what to add to the error message."""
    try:
        api.delete_repo(repo_id, missing_ok=True)
    except Exception:  # the Hub has just failed once
        return f" An empty {repo_id} was created and could not be deleted again."
    return ""


def check_name(repo_id: str) -> None:
    """Raise ValueError for a repository name that the Hub does not allow."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"{repo_id!r} is not a repository name; expected NAMESPACE/NAME of letters, digits, "
            f"'-', '_' and '.'. {error}"
        ) from None


def _explain(error: BaseException, repo_id: str) -> str:
    """What a failed exchange with the Hub means, and what to do."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    again = "Nothing was committed; run the same command again."
    if isinstance(error, LocalTokenNotFoundError):
        return f"No token: run `hf auth login`, or set HF_TOKEN. Create one at {_TOKENS_PAGE}."
    if cause is None:
        return f"The Hub cannot be reached: {type(error).__name__}: {error}. {again}"
    status = cause.response.status_code
    if status == 401:
        if get_token() is None:
            return f"No token: run `hf auth login`, or set HF_TOKEN. Create one at {_TOKENS_PAGE}."
        return f"The Hub refuses the token. Create one with write access at {_TOKENS_PAGE}."
    if status == 403:
        return f"The token cannot write to {repo_id}: another namespace, or a read-only token."
    return f"The Hub answered {status} to {cause.response.request.url.path}. {again}"


def _without(token: str | None, text: str) -> str:
    text = " ".join(text.split())
    return text.replace(token, "<token>") if token else text
