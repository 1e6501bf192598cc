"""Reading parts of objects at s3:// addresses through s3fs, with the retries that the caller gives.

Credentials, region and endpoint are what botocore finds: AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, a role of the machine;
FSSPEC_S3_ANON=true reads public buckets without any. No message holds more of them than their names.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import urllib3

T = TypeVar("T")

_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or FSSPEC_S3_ANON=true for a public bucket"


def size(address: str, retries: urllib3.Retry) -> int:
    """Bytes. Raises FileNotFoundError, also for what is no object but the beginning of the names of others."""
    info = _tried(address, retries, lambda s3: s3.info(address))
    if info["type"] != "file":
        raise FileNotFoundError(f"data.path: {address} is no object but holds others")
    return int(info["size"])


def read(address: str, start: int | None, end: int | None, retries: urllib3.Retry) -> bytes:
    """The bytes from `start` up to `end`, fewer at the end of the object."""

    def call(s3: Any) -> bytes:
        try:
            return bytes(s3.cat_file(address, start=start, end=end))
        except OSError as error:
            if _code(error) == "InvalidRange":  # behind the end
                return b""
            raise

    return _tried(address, retries, call)


def _tried(address: str, retries: urllib3.Retry, call: Callable[[Any], T]) -> T:
    filesystem = _filesystem()
    while True:
        try:
            return call(filesystem)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"data.path: {address} does not exist") from error
        except PermissionError as error:
            raise PermissionError(f"data.path: {address} may not be read ({_code(error)}); {_CREDENTIALS}") from error
        except Exception as error:
            retries = _next(address, retries, error)
            retries.sleep()


def _next(address: str, retries: urllib3.Retry, error: Exception) -> urllib3.Retry:
    """What is left of the retries. Raises what the error means where trying again does not help."""
    from botocore.exceptions import NoCredentialsError, ParamValidationError

    if isinstance(error, NoCredentialsError):
        raise PermissionError(f"data.path: {address} needs credentials, and there are none; {_CREDENTIALS}") from error
    if isinstance(error, ParamValidationError):
        raise ValueError(f"data.path={address} is no address of an object; write s3://bucket/name") from error
    try:
        return retries.increment(error=error)
    except urllib3.exceptions.MaxRetryError:
        raise ConnectionError(f"data.path: {address} cannot be reached: {_code(error)}") from error


def _code(error: Exception) -> str:
    """S3's own word for what went wrong, or the kind of the error; its text might hold more than a log may."""
    answer = getattr(error.__cause__, "response", {})
    return str(answer.get("Error", {}).get("Code", type(error).__name__))


@cache
def _filesystem() -> Any:
    import fsspec

    config = {"retries": {"total_max_attempts": 1}, "connect_timeout": 10, "read_timeout": 60, "max_pool_connections": 32}
    try:
        filesystem = fsspec.filesystem("s3", config_kwargs=config, skip_instance_cache=True, use_listings_cache=False)
    except ImportError as error:
        raise ValueError("data.path: s3:// needs the package s3fs; install it with pip install 'hyper-sd[s3]'") from error
    filesystem.retries = 1  # and none inside those of _tried, or an end would take hours
    return filesystem
