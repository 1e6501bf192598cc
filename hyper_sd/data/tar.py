"""Where the members of samples are in a tar shard, found by one walk over its headers."""

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from webdataset.shardlists import expand_urls

from hyper_sd.data import storage
from hyper_sd.data.base import BadSample, BadSampleError
from hyper_sd.data.images import IMAGE_SUFFIXES

LATENTS = ("latent.npy", "latent.safetensors")
CAPTIONS = ("txt", "json")
_PICKLES = ("pickle", "pkl", "pyd", "pth", "pt", "bin", "ckpt", "joblib", "dill")


@dataclass(frozen=True, slots=True)
class Member:
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class TarSample:
    """Where the members of a sample are, by what follows the key in their names."""

    shard: str
    key: str
    members: dict[str, Member]

    def __str__(self) -> str:
        return f"sample {self.key} of {storage.shown(self.shard)}"

    def one_of(self, kinds: Sequence[str]) -> str | None:
        return next((kind for kind in kinds if kind in self.members), None)

    def read(self, kind: str, shard: str | None = None) -> bytes:
        """The member's content, from a copy of the shard where one is named. Raises BadSampleError if the shard ends before."""
        member = self.members[kind]
        data = storage.read(shard or self.shard, member.offset, member.size)
        if len(data) != member.size:
            raise BadSampleError(str(self), "torn shard", "ends early")
        return data


def shards(path: str) -> list[str]:
    """The addresses of a brace pattern such as `data/{0000..0099}.tar`, or of several joined by `::`.

    Raises ValueError, naming data.path, for an address that is neither a local file that is there, nor http(s):// or s3://; OSError
    if the first remote one cannot be reached.
    """
    try:
        addresses = [address for part in path.split("::") for address in expand_urls(part)]
    except (AssertionError, ValueError) as error:  # unbalanced braces, or a ${...} that is not set
        raise ValueError(f"data.path={path} is not a pattern of paths: {error}") from error
    missing = [address for address in addresses if not storage.is_remote(address) and not Path(address).is_file()]
    if missing:
        raise ValueError(f"data.path={path}: {len(missing)} of {len(addresses)} shards are no files (first: {missing[0]})")
    if remote := [address for address in addresses if storage.is_remote(address)]:
        storage.size(remote[0])  # a wrong name is told before weights are loaded
    return addresses


def samples(shard: str, copy: str | None = None) -> tuple[list[TarSample], list[BadSample]]:
    """The samples of a shard in its order, and what is wrong with others; the headers are read in `copy` where that is given.

    Of a torn shard the whole samples before the tear are there. Raises ValueError for a member that no honest shard holds: a path
    out of the archive, a link, a device, a pickle.
    """
    found: dict[str, TarSample] = {}
    bad: list[BadSample] = []
    for member in _headers(copy or shard, shard, bad):
        name = PurePosixPath(member.name)
        stem, _, suffix = name.name.lower().partition(".")
        if name.is_absolute() or ".." in name.parts or not (member.isreg() or member.isdir()) or member.issparse():
            raise ValueError(_refusal(shard, member.name, "which is no plain file inside the archive"))
        if suffix.rpartition(".")[2] in _PICKLES:
            raise ValueError(_refusal(shard, member.name, "and pickles can run code"))
        if stem and suffix in (*IMAGE_SUFFIXES, *LATENTS, *CAPTIONS) and member.isreg():
            key = str(name.with_name(name.name.partition(".")[0]))
            sample = found.setdefault(key, TarSample(shard, key, {}))
            if suffix in sample.members:
                bad.append(BadSample(str(sample), "duplicate key", f"{member.name!r} is there twice; the first is used"))
            else:
                sample.members[suffix] = Member(member.offset_data, member.size)
    whole = []
    for sample in found.values():
        wrong = _wrong(sample)
        if wrong is None:
            whole.append(sample)
        else:
            bad.append(wrong)
    return whole, bad


def _headers(file: str, shard: str, bad: list[BadSample]) -> Iterator[tarfile.TarInfo]:
    """The headers up to the end of the archive, or up to where it is torn, which is put down as bad."""
    end = 0
    with storage.opened(file) as stream:
        total = storage.size(file)
        try:
            with tarfile.open(fileobj=stream, mode="r:") as archive:  # pyright: ignore[reportArgumentType, reportCallIssue]
                for member in archive:
                    if member.isreg() and member.offset_data + member.size > total:
                        raise tarfile.ReadError(f"{member.name!r} is cut off")
                    end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    yield member
            stream.seek(end)  # tarfile stops at a broken header as if the archive ended there
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no member and no end of the archive at byte {end}")
        except (tarfile.TarError, EOFError) as error:
            bad.append(BadSample(storage.shown(shard), "torn shard", f"not a whole, uncompressed tar file: {error}"))


def _wrong(sample: TarSample) -> BadSample | None:
    if sample.one_of((*IMAGE_SUFFIXES, *LATENTS)) is None:
        return BadSample(str(sample), "no image", f"and no latent, only {sorted(sample.members)}")
    if sample.one_of(CAPTIONS) is None and "latent.safetensors" not in sample.members:
        return BadSample(str(sample), "no caption", f"add {sample.key}.txt, or {sample.key}.json with a text")
    return None


def _refusal(shard: str, member: str, why: str) -> str:
    return f"data.path: {storage.shown(shard)} holds {member!r}, {why}; the shard is refused"
