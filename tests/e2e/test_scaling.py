"""What the cost of scale is made of."""

import pytest

from benchmarks.scaling import Options, count, predict


def test_bytes_of_sd15_at_rank_64() -> None:
    """Both roles of a score cycle are an adapter of the released size; the base is 860 million numbers in bf16."""
    traffic = count(Options(teacher="sd15_random", stage="score", batch_size=2))
    assert traffic.roles == {"student": 67_252_224, "fake": 67_252_224} and traffic.updates == {"student": 1, "fake": 2}
    assert traffic.reduced(4)["student"] == 2 * traffic.reduced(2)["student"] == 269_008_896
    assert traffic.base_bytes == pytest.approx(2 * 859.5e6, rel=1e-3) and traffic.base_passes == 9


def test_efficiency_falls_with_slower_networks_and_more_gpus() -> None:
    options = Options(teacher="sd15_random", stage="tscd", batch_size=2, latency_us=0)
    traffic = count(options)
    share = {
        (network, gpus): predict(options, traffic, 0.1, network, gpus)
        for network in ("NVLink", "400 Gbit", "100 Gbit")
        for gpus in (8, 64, 512)
    }
    for kind in ("plain", "no_overlap", "zero3"):
        for gpus in (64, 512):
            assert 1 > share["NVLink", gpus][kind] > share["400 Gbit", gpus][kind] > share["100 Gbit", gpus][kind] > 0
        assert share["100 Gbit", 64]["plain"] > share["100 Gbit", 64]["no_overlap"]
    assert share["400 Gbit", 8] | {"network": ""} == share["NVLink", 8] | {"network": ""}  # one node: no network is used
    by_hand = 2 * (7 / 8 / (450e9 * 0.7) + 7 / 8 / (50e9 * 0.7)) * 269_008_896
    assert share["400 Gbit", 64]["reduce_s"] == pytest.approx(by_hand, rel=0.01)
