"""Failures of disks and object storage, told in one line that names the place and never a credential."""

import contextlib
from collections.abc import Iterator

from botocore.exceptions import BotoCoreError, EndpointConnectionError, NoCredentialsError

from corpus.errors import RunError, UserError

# What a server answers for a moment only; s3fs and botocore have tried five times each before it gets here.
_PASSING = {"409", "500", "502", "503", "504", "ConditionalRequestConflict", "OperationAborted", "InternalError"}
_PASSING |= {"ServiceUnavailable", "SlowDown", "RequestTimeout", "NoSuchUpload"}
_REFUSED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "403"}


def error_codes(error: BaseException) -> set[str]:
    """Codes of S3's answer (its name and its HTTP status) behind an error of s3fs; empty for any other error."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}
    codes = {response.get("Error", {}).get("Code"), response.get("ResponseMetadata", {}).get("HTTPStatusCode")}
    return {str(code) for code in codes if code is not None}


def is_taken(error: BaseException) -> bool:
    """Tell whether a conditional write was refused because the name is taken (412)."""
    return isinstance(error, FileExistsError) or bool(error_codes(error) & {"412", "PreconditionFailed"})


def is_passing(error: BaseException) -> bool:
    """Tell whether the same request may succeed a little later, or has succeeded without our hearing of it."""
    if isinstance(error, NoCredentialsError):
        return False
    return isinstance(error, BotoCoreError | TimeoutError | ConnectionError) or bool(error_codes(error) & _PASSING)


@contextlib.contextmanager
def told(uri: str) -> Iterator[None]:
    """Turn what the storage libraries raise into our two kinds of error.

    Raises
    ------
    UserError
        For a missing file or bucket, refused access, missing or wrong credentials.
    RunError
        For anything else: no connection, a server out of order, a full disk.
    """
    try:
        yield
    except FileNotFoundError as error:
        what = "no such bucket" if "NoSuchBucket" in error_codes(error) else "no such file"
        raise UserError(f"{uri}: {what}") from error
    except NoCredentialsError as error:
        raise UserError(f"{uri}: no credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE, an instance role, ...)") from error
    except EndpointConnectionError as error:
        raise RunError(f"{uri}: cannot reach the object storage (see AWS_ENDPOINT_URL)") from error
    except (OSError, BotoCoreError) as error:
        codes = error_codes(error)
        if isinstance(error, PermissionError) or codes & _REFUSED:
            said = f" ({', '.join(sorted(codes))})" if codes else ""
            raise UserError(f"{uri}: access refused{said}; check the credentials and their rights") from error
        # An answer of the server is told by its code: its text may repeat parts of the request.
        text = ", ".join(sorted(codes)) if codes else (getattr(error, "strerror", None) or type(error).__name__)
        raise RunError(f"{uri}: {text}; run the same command again to go on") from error
