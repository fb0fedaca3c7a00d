//! Sizes, rates, times and shares as people write and read them: `"64 KiB"`, `"200 MiB/s"`, `"5 s"`, `"5 %"`.
//!
//! Binary units throughout. Numbers are whole: `"1.5 GiB"` is refused, `"1536 MiB"` is meant.

use std::fmt::{self, Display};
use std::time::Duration;

/// Text that is no size, rate, time or share.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnitError {
    /// Not a size.
    #[error("'{text}' is not a size; write for example \"64 KiB\", \"4 GiB\"")]
    NotASize {
        /// What was given.
        text: String,
    },
    /// Not a rate.
    #[error("'{text}' is not a rate; write for example \"200 MiB/s\", or \"0\" for no limit")]
    NotARate {
        /// What was given.
        text: String,
    },
    /// Not a time.
    #[error("'{text}' is not a length of time; write for example \"5 s\", \"500 ms\", \"26h\"")]
    NotADuration {
        /// What was given.
        text: String,
    },
    /// Neither a share nor a size.
    #[error("'{text}' is neither a share like \"5 %\" nor a size like \"10 GiB\"")]
    NotAShare {
        /// What was given.
        text: String,
    },
}

/// How much is to be left free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MinFree {
    /// Of the whole, percent (0 to 100).
    Percent(u8),
    /// Bytes.
    Bytes(u64),
}

impl MinFree {
    /// In bytes, of a file system of `total_bytes`.
    pub fn bytes_of(self, total_bytes: u64) -> u64 {
        match self {
            Self::Percent(percent) => {
                let part = u128::from(total_bytes) * u128::from(percent) / 100;
                u64::try_from(part).unwrap_or(u64::MAX)
            }
            Self::Bytes(bytes) => bytes,
        }
    }

    /// Parses `"5 %"` or a size.
    pub fn parse(text: &str) -> Result<Self, UnitError> {
        let (number, unit) = split(text);
        if unit == "%" {
            return match number {
                Some(percent) if percent <= 100 => {
                    Ok(Self::Percent(u8::try_from(percent).unwrap_or(100)))
                }
                Some(_) | None => Err(UnitError::NotAShare {
                    text: text.to_owned(),
                }),
            };
        }
        parse_size(text)
            .map(Self::Bytes)
            .map_err(|_source| UnitError::NotAShare {
                text: text.to_owned(),
            })
    }
}

impl Display for MinFree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Percent(percent) => write!(f, "{percent} %"),
            Self::Bytes(bytes) => write!(f, "{}", size(*bytes)),
        }
    }
}

/// Bytes of `"64 KiB"`; also `64K`, `64KiB`, `65536`, `65536 B`.
pub fn parse_size(text: &str) -> Result<u64, UnitError> {
    let (number, unit) = split(text);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => Some(0),
        "k" | "kib" => Some(10),
        "m" | "mib" => Some(20),
        "g" | "gib" => Some(30),
        "t" | "tib" => Some(40),
        "p" | "pib" => Some(50),
        _ => None,
    };
    number
        .zip(shift)
        .and_then(|(n, shift)| n.checked_mul(1_u64 << shift))
        .ok_or_else(|| UnitError::NotASize {
            text: text.to_owned(),
        })
}

/// Bytes per second of `"200 MiB/s"`; `None` for `"0"`: no limit.
pub fn parse_rate(text: &str) -> Result<Option<u64>, UnitError> {
    let amount = text.trim();
    let amount = amount.strip_suffix("/s").unwrap_or(amount);
    match parse_size(amount) {
        Ok(0) => Ok(None),
        Ok(bytes) => Ok(Some(bytes)),
        Err(_) => Err(UnitError::NotARate {
            text: text.to_owned(),
        }),
    }
}

/// Time of `"5 s"`, `"500 ms"`, `"10 min"`, `"26h"`, `"2 d"`.
pub fn parse_duration(text: &str) -> Result<Duration, UnitError> {
    let (number, unit) = split(text);
    let millis = match unit {
        "ms" => Some(1),
        "s" => Some(1000),
        "m" | "min" => Some(60_000),
        "h" => Some(3_600_000),
        "d" => Some(86_400_000),
        "w" => Some(7 * 86_400_000),
        _ => None,
    };
    number
        .zip(millis)
        .and_then(|(n, millis): (u64, u64)| n.checked_mul(millis))
        .map(Duration::from_millis)
        .ok_or_else(|| UnitError::NotADuration {
            text: text.to_owned(),
        })
}

/// Number and unit; ASCII digits only, blanks around either ignored.
fn split(text: &str) -> (Option<u64>, &str) {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    (number.parse().ok(), unit.trim())
}

/// A size for people: three or four digits and a binary unit, `1.3 MiB`.
pub fn size(bytes: u64) -> String {
    const UNITS: &[&str] = &["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut whole = bytes;
    let mut rest = 0;
    let mut name = "B";
    for unit in UNITS {
        if whole < 1024 {
            break;
        }
        rest = whole % 1024;
        whole /= 1024;
        name = unit;
    }
    if rest == 0 || whole >= 100 {
        format!("{whole} {name}")
    } else {
        format!("{whole}.{} {name}", rest * 10 / 1024)
    }
}

/// A size that parses back to itself: `64 KiB`, else plain bytes. For files.
pub fn exact_size(bytes: u64) -> String {
    [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")]
        .into_iter()
        .find(|(shift, _)| bytes != 0 && bytes.trailing_zeros() >= *shift)
        .map_or_else(
            || bytes.to_string(),
            |(shift, unit)| format!("{} {unit}", bytes >> shift),
        )
}

/// A length of time for people: `0.21 s`, `12 s`, `3 min 5 s`, `26 h`.
pub fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..10 => format!("{}.{:02} s", seconds, time.subsec_millis() / 10),
        10..120 => format!("{seconds} s"),
        120..7200 => format!("{} min {} s", seconds / 60, seconds % 60),
        7200..172_800 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_parse() {
        for (text, bytes) in [
            ("64 KiB", 65536),
            ("64KiB", 65536),
            ("64k", 65536),
            ("0", 0),
            (" 4 GiB ", 4 << 30),
            ("1 TiB", 1 << 40),
            ("512 B", 512),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for bad in [
            "",
            "KiB",
            "1.5 GiB",
            "-1",
            "64 KB",
            "64 Kib/s",
            "99999999 PiB",
            "٣",
        ] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn rates_times_and_shares_parse() {
        assert_eq!(parse_rate("200 MiB/s"), Ok(Some(200 << 20)));
        assert_eq!(parse_rate("200M"), Ok(Some(200 << 20)));
        assert_eq!(parse_rate("0"), Ok(None));
        parse_rate("fast").unwrap_err();
        assert_eq!(parse_duration("26h"), Ok(Duration::from_secs(26 * 3600)));
        assert_eq!(parse_duration("5 s"), Ok(Duration::from_secs(5)));
        assert_eq!(parse_duration("500 ms"), Ok(Duration::from_millis(500)));
        parse_duration("5").unwrap_err();
        assert_eq!(MinFree::parse("5 %"), Ok(MinFree::Percent(5)));
        assert_eq!(MinFree::parse("1 GiB"), Ok(MinFree::Bytes(1 << 30)));
        MinFree::parse("101 %").unwrap_err();
        assert_eq!(MinFree::Percent(5).bytes_of(u64::MAX), u64::MAX / 20);
    }

    #[test]
    fn shown_for_people() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(65536), "64 KiB");
        assert_eq!(size(1_310_720), "1.2 MiB");
        assert_eq!(size(1 << 30), "1 GiB");
        assert_eq!(size(u64::MAX), "15.9 EiB");
        assert_eq!(duration(Duration::from_millis(210)), "0.21 s");
        assert_eq!(duration(Duration::from_secs(185)), "3 min 5 s");
    }

    proptest! {
        /// What is written into a file reads back as the same number.
        #[test]
        fn exact_sizes_lead_back(n in any::<u64>(), shift in 0_u32..40) {
            let bytes = (n >> 24) << shift;
            prop_assert_eq!(parse_size(&exact_size(bytes)), Ok(bytes));
        }

        /// Never a panic, whatever is typed.
        #[test]
        fn any_text_is_answered(text in "\\PC*") {
            drop(parse_size(&text));
            drop(parse_rate(&text));
            drop(parse_duration(&text));
            drop(MinFree::parse(&text));
        }
    }
}
