"""What went wrong with a request to a store of shards, in words: each library raises errors of its own."""

from __future__ import annotations

import json
import re
import ssl

from clip_rd_edge.errors import InputError, causes
from clip_rd_edge.utils.text import shown_message, shown_source

_CREDENTIALS_HINT = (
    "check the credentials that its store expects, such as AWS_PROFILE for s3:// or HF_TOKEN for hf://, and renew them "
    "if they have expired"
)
# botocore's errors about a profile, or a login, that is not there; those about credentials say so in their names.
_CREDENTIALS_ERRORS = ("ProfileNotFound", "SSOTokenLoadError", "UnauthorizedSSOTokenError", "TokenRetrievalError")
# Further ones about settings, beside ValueErrors.
_SETTINGS_ERRORS = ("ParamValidationError", "InvalidConfigError", "ConfigParseError", "ConfigNotFound", "NoRegionError")
_ERRNO = re.compile(r"^\[Errno \d+\] ")


def refusal(url: str, error: BaseException) -> InputError | None:
    """Return the error for what no later try would change, if this is such an answer."""
    status, reason, shard = http_status(error), reason_of(error, url), shown_source(url)
    names = {type(cause).__name__ for cause in causes(error)}
    # fsspec raises FileNotFoundError also for servers that cannot be reached; the cause is the difference.
    if status == 404 or (isinstance(error, FileNotFoundError) and error.__cause__ is None):
        return InputError(f"The shard {shard} does not exist{f': {reason}' if 'bucket' in reason else ''}.")
    if any("Credential" in name for name in names) or names.intersection(_CREDENTIALS_ERRORS):
        return InputError(f"The shard {shard} may not be read: {reason}.", hint=_CREDENTIALS_HINT)
    if status in (401, 403) or isinstance(error, PermissionError):
        hint = _CREDENTIALS_HINT
        if "request time" in reason:  # such as "The difference between the request time and the current time …"
            hint = "set this machine's clock, with which requests are signed"
        elif is_web(url) and "?" in url:
            hint = "its signature may have expired: name the shards by new URLs, which {resume} takes, too"
        return InputError(f"The shard {shard} may not be read: {reason}.", hint=hint)
    if status in (301, 400) and (region := _bucket_region(error)):
        return InputError(
            f"The bucket of the shard {shard} is in the region {region}, but was looked for in another one.",
            hint=f"set the region: AWS_DEFAULT_REGION={region}",
        )
    if status == 400 and not is_web(url):  # so S3 answers to a token that has expired
        return InputError(f"The shard {shard} may not be read: {reason}.", hint=_CREDENTIALS_HINT)
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes(error)):
        why = next(filter(None, (getattr(cause, "verify_message", "") for cause in causes(error))), reason)
        return InputError(
            f"The shard {shard} could not be fetched: its server's certificate is refused: {why}.",
            hint="check this machine's clock, or name a file with your network's certificates: SSL_CERT_FILE, for "
            "s3:// AWS_CA_BUNDLE",
        )
    if names.intersection(_SETTINGS_ERRORS) or any(map(_is_invalid_value, (error, error.__cause__))):
        return InputError(
            f"The shard {shard} could not be fetched: {reason}.",
            hint="check its address, and the settings of its store, such as AWS_ENDPOINT_URL for s3://",
        )
    return None


def is_web(url: str) -> bool:
    """Return whether a URL is that of a web server, and not of a store with a protocol of its own."""
    return url.startswith(("http://", "https://"))


def _is_invalid_value(error: BaseException | None) -> bool:
    """Return whether an error is about an address or a setting, and not about an answer that is no JSON, or no text."""
    return isinstance(error, ValueError) and not isinstance(error, (json.JSONDecodeError, UnicodeError))


def _bucket_region(error: BaseException) -> str | None:
    """Return the region that an S3 store names in its answer to a request in another one."""
    for cause in causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            region: str | None = response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region")
            return region
    return None


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status behind an error of aiohttp, botocore, huggingface_hub or gcsfs, if there is one."""
    for cause in causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) or None
        for status in (getattr(cause, "status", None), getattr(response, "status_code", None), _gcs_status(cause)):
            if isinstance(status, int):
                return status
    return None


def _gcs_status(error: BaseException) -> int | None:
    if type(error).__name__ == "HttpError":
        return getattr(error, "code", None)
    # gcsfs says no more of a refusal than that.
    return 403 if type(error) is OSError and str(error).startswith("Forbidden: ") else None


def reason_of(error: BaseException, url: str = "") -> str:
    """Return the first line that an error says, or one of its causes, if it says nothing but the shard's URL.

    So do fsspec's errors on servers that cannot be reached; its time-outs say nothing at all.
    """
    texts = (_ERRNO.sub("", str(cause).strip()) for cause in causes(error))
    text = next((text for text in texts if text not in ("", url)), type(error).__name__)
    first, *others = text.splitlines()
    return shown_message(f"{first} {others[0].strip()}" if first.endswith(":") and others else first).rstrip(".")
