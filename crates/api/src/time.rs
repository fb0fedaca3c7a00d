//! Wall-clock times as they are shown and typed: local with offset for people, RFC 3339 in UTC in JSON.

use blktide_types::clock::WallTime;
use jiff::civil::{Date, DateTime, Time};
use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};
use std::fmt;

/// Text that is no local time.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no such time; a day is 2026-11-17, a moment 2026-11-17T02:10")]
pub struct NotATime;

/// A day or a moment in local time, as typed after '@'.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LocalMoment {
    /// A whole day: its first image-free instant is the next midnight.
    Day(Date),
    /// A moment; seconds count if they were given, else the whole minute does.
    Minute(DateTime),
    /// A moment to the second.
    Second(DateTime),
}

impl LocalMoment {
    /// Parses `2026-11-17`, `2026-11-17T02:10` and `2026-11-17T02:10:30`.
    pub fn parse(text: &str) -> Result<Self, NotATime> {
        let shape: String = text
            .chars()
            .map(|c| if c.is_ascii_digit() { '0' } else { c })
            .collect();
        let parsed = match shape.as_str() {
            "0000-00-00" => text.parse().ok().map(Self::Day),
            "0000-00-00T00:00" => text.parse().ok().map(Self::Minute),
            "0000-00-00T00:00:00" => text.parse().ok().map(Self::Second),
            _ => None,
        };
        parsed.ok_or(NotATime)
    }

    /// The last nanosecond that counts as 'not after' this in `zone`, and the first that counts at all (a day is
    /// only itself; a moment reaches back for ever).
    pub fn range(&self, zone: &TimeZone) -> Option<(WallTime, WallTime)> {
        let wall = |at: DateTime| zone.to_zoned(at).ok().map(|z| wall_of(z.timestamp()));
        let (start, end) = match self {
            Self::Day(day) => (
                wall(day.to_datetime(Time::midnight()))?,
                wall(day.tomorrow().ok()?.to_datetime(Time::midnight()))?,
            ),
            Self::Minute(at) => (
                WallTime(i64::MIN),
                WallTime(wall(*at)?.0.saturating_add(60 * NANOS)),
            ),
            Self::Second(at) => (
                WallTime(i64::MIN),
                WallTime(wall(*at)?.0.saturating_add(NANOS)),
            ),
        };
        Some((start, WallTime(end.0.saturating_sub(1))))
    }

    /// [`Self::range`] in the machine's zone.
    pub fn local_range(&self) -> Option<(WallTime, WallTime)> {
        self.range(&TimeZone::system())
    }
}

const NANOS: i64 = 1_000_000_000;

impl fmt::Display for LocalMoment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Day(day) => write!(f, "{day}"),
            Self::Minute(at) => write!(f, "{}", at.strftime("%Y-%m-%dT%H:%M")),
            Self::Second(at) => write!(f, "{}", at.strftime("%Y-%m-%dT%H:%M:%S")),
        }
    }
}

fn wall_of(timestamp: Timestamp) -> WallTime {
    let nanos = timestamp.as_nanosecond();
    WallTime(i64::try_from(nanos).unwrap_or(if nanos < 0 { i64::MIN } else { i64::MAX }))
}

fn timestamp_of(time: WallTime) -> Timestamp {
    Timestamp::from_nanosecond(i128::from(time.0)).unwrap_or(Timestamp::UNIX_EPOCH)
}

/// `2026-11-17T01:10:30Z`.
pub fn rfc3339(time: WallTime) -> String {
    timestamp_of(time)
        .strftime("%Y-%m-%dT%H:%M:%SZ")
        .to_string()
}

/// The time of an RFC 3339 text.
pub fn from_rfc3339(text: &str) -> Result<WallTime, NotATime> {
    text.parse::<Timestamp>()
        .map(wall_of)
        .map_err(|_source| NotATime)
}

/// `2026-11-17 02:10:30 +01:00`, in the machine's zone.
pub fn local(time: WallTime) -> String {
    let zoned: Zoned = timestamp_of(time).to_zoned(TimeZone::system());
    zoned.strftime("%Y-%m-%d %H:%M:%S %:z").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn utc_in_json_and_back() {
        let time = WallTime(1_763_341_830 * NANOS);
        assert_eq!(rfc3339(time), "2025-11-17T01:10:30Z");
        assert_eq!(from_rfc3339("2025-11-17T01:10:30Z"), Ok(time));
        assert_eq!(from_rfc3339("yesterday"), Err(NotATime));
        assert_eq!(rfc3339(WallTime(0)), "1970-01-01T00:00:00Z");
    }

    #[test]
    fn a_day_is_only_itself_and_a_moment_reaches_back() {
        let zone = TimeZone::fixed(jiff::tz::offset(1));
        let (start, end) = LocalMoment::parse("2025-11-17")
            .unwrap()
            .range(&zone)
            .unwrap();
        assert_eq!(rfc3339(start), "2025-11-16T23:00:00Z");
        assert_eq!(rfc3339(end), "2025-11-17T22:59:59Z");
        let (start, end) = LocalMoment::parse("2025-11-17T02:10")
            .unwrap()
            .range(&zone)
            .unwrap();
        assert_eq!(start, WallTime(i64::MIN));
        assert_eq!(rfc3339(end), "2025-11-17T01:10:59Z");
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for bad in [
            "",
            "2025",
            "2025-02-30",
            "2025-11-17T25:00",
            "2025-11-17 02:10",
            "2025-11-17T02:10Z",
            "２０２５-11-17",
        ] {
            assert_eq!(LocalMoment::parse(bad), Err(NotATime), "{bad}");
        }
    }
}
