"""Numbers as people read them."""

from nemo_rl_lora.scalars import scaled_bytes


def test_bytes_have_the_largest_unit_of_which_there_is_one():
    shown = {0: "0 B", 1023: "1023 B", 1536: "1.5 KiB", 828_375_040: "790.0 MiB", 5 * 2**30: "5.0 GiB"}
    assert {num_bytes: scaled_bytes(num_bytes) for num_bytes in shown} == shown
    assert scaled_bytes(2000 * 2**40) == "2,000.0 TiB"
