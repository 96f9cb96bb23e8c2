"""Which configurations of MS-SWIFT are possible."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longswift.core.errors import ConfigError, check_positive, problem
from longswift.mechanisms.selectors.base import Selector

if TYPE_CHECKING:
    from longswift.mechanisms.ms_swift import MSSwift


def check_ms_swift(config: MSSwift) -> None:
    """Raise ``ConfigError`` for the first impossible option."""

    def require(fine: bool, name: str, expected: str, fix: str) -> None:
        if not fine:
            got = repr(getattr(config, name))
            raise ConfigError(problem(f"MSSwift.{name}", expected=expected, got=got, fix=fix))

    assert isinstance(config.selector, Selector)
    check_positive("MSSwift", block=config.block)
    require(_is_count(config.sinks), "sinks", "an integer >= 0", "Use 0 to turn it off.")
    require(
        config.dense_below is None or _is_count(config.dense_below),
        "dense_below",
        "an integer >= 0, or None for what suits the device",
        "Use 0 to turn it off.",
    )
    require(
        _is_count(config.key_tokens)
        or isinstance(config.key_tokens, tuple)
        and len(config.key_tokens) > 0
        and all(_is_count(budget) for budget in config.key_tokens),
        "key_tokens",
        "an integer >= 0, or one per KV head",
        "Use 0 to turn it off.",
    )
    require(
        isinstance(config.dense_heads, tuple)
        and all(_is_count(head) for head in config.dense_heads)
        and list(config.dense_heads) == sorted(set(config.dense_heads)),
        "dense_heads",
        "a tuple of distinct ascending KV head indices",
        "Use () for none.",
    )
    windows = config.windows
    require(
        isinstance(windows, tuple)
        and len(windows) > 0
        and all(type(w) is int and w > 0 for w in windows)
        and list(windows) == sorted(set(windows)),
        "windows",
        "a tuple of distinct ascending window sizes in tokens",
        "For example windows=(128, 512, 2048).",
    )
    require(
        _is_share(config.overlap) and config.overlap < 1.0,
        "overlap",
        "a share above 0 and below 1",
        "Use 0.2 to 0.5.",
    )
    require(
        config.coverage is None or _is_share(config.coverage),
        "coverage",
        "None or a share in (0, 1]",
        "For example coverage=0.95.",
    )
    require(
        config.min_coverage is None or _is_share(config.min_coverage),
        "min_coverage",
        "None or a share in (0, 1]",
        "For example min_coverage=0.95.",
    )
    require(
        config.delta is None
        or type(config.delta) is int
        and config.delta > 0
        and config.block % config.delta == 0,
        "delta",
        f"None or a divisor of block={config.block}",
        "For example delta=64, or None for no correction.",
    )
    require(isinstance(config.collect, bool), "collect", "True or False", "Leave it at False.")
    require(
        config.causality in ("auto", "shared", "strict"),
        "causality",
        "'auto', 'shared' or 'strict'",
        "Leave it at 'auto'.",
    )
    key_block = config.selector.key_block
    require(
        config.block % key_block == 0,
        "block",
        f"a multiple of the selector's key_block={key_block}",
        "Use block=128, or a selector with smaller key blocks.",
    )
    require(
        config.remainder is None
        or (isinstance(config.remainder, int) and config.remainder > 0)
        and config.remainder % key_block == 0,
        "remainder",
        f"None or a multiple of the selector's key_block={key_block}",
        "For example remainder=256.",
    )
    require(
        config.scale_of_head is None
        or isinstance(config.scale_of_head, tuple)
        and all(isinstance(s, int) and 0 <= s < len(windows) for s in config.scale_of_head),
        "scale_of_head",
        f"one index below {len(windows)} per KV head",
        "Leave it None to spread the scales over the heads.",
    )


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and value is not True and 0.0 < value <= 1.0
