//! Names: of volumes, repositories and images, and what a word on the command line means.

use crate::time::{LocalMoment, NotATime};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// A name of a volume or a repository: `[A-Za-z0-9][A-Za-z0-9_-]{0,47}`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

/// Text that is not a name, or not an image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// Not a name.
    #[error(
        "'{text}' is not a name: letters, digits, '_' and '-', a letter or digit first, at most 48"
    )]
    NotAName {
        /// What was given.
        text: String,
    },
    /// Not an image name.
    #[error(
        "'{text}' is not an image: write [HOST/]VOLUME@WHICH, WHICH a number, 'latest' or a time"
    )]
    NotAnImage {
        /// What was given.
        text: String,
    },
    /// The part after '@' is no number, not `latest` and no time.
    #[error("'{which}' is not a number, not 'latest', and no local time like 2026-11-17T02:10")]
    NotAWhich {
        /// What was given.
        which: String,
        /// Why it is no time.
        source: NotATime,
    },
}

impl Name {
    /// A checked name.
    pub fn new(text: &str) -> Result<Self, NameError> {
        let mut chars = text.chars();
        let first = chars.next().is_some_and(|c| c.is_ascii_alphanumeric());
        let rest = chars.all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
        if first && rest && text.len() <= 48 {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameError::NotAName {
                text: text.to_owned(),
            })
        }
    }

    /// `main`: the repository that is meant when none is named.
    pub fn main() -> Self {
        Self("main".to_owned())
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for Name {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::new(text)
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        Self::new(&text)
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

/// A repository as it is given to `-r`: a registered name, or (with a '/') a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RepositoryRef {
    /// Registered in `repositories.d`.
    Name(Name),
    /// A folder; needs neither configuration nor daemon.
    Path(PathBuf),
}

impl FromStr for RepositoryRef {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.contains('/') {
            Ok(Self::Path(PathBuf::from(text)))
        } else {
            Name::new(text).map(Self::Name)
        }
    }
}

impl fmt::Display for RepositoryRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => write!(f, "{name}"),
            Self::Path(path) => write!(f, "{}", path.display()),
        }
    }
}

/// Which image of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// The image's number in its repository, from 1.
    Number(u64),
    /// The newest.
    Latest,
    /// The newest not after this moment (given as a day: of that day).
    NotAfter(LocalMoment),
}

/// `[HOST/]VOLUME@WHICH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageName {
    /// The host's name; `None` is this machine.
    pub host: Option<String>,
    /// The volume.
    pub volume: Name,
    /// Which of its images.
    pub which: Which,
}

impl FromStr for ImageName {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let not_an_image = || NameError::NotAnImage {
            text: text.to_owned(),
        };
        let (left, which) = text.rsplit_once('@').ok_or_else(not_an_image)?;
        let (host, volume) = match left.split_once('/') {
            Some((host, volume)) if host_is_plausible(host) => (Some(host.to_owned()), volume),
            Some(_) => return Err(not_an_image()),
            None => (None, left),
        };
        Ok(Self {
            host,
            volume: Name::new(volume)?,
            which: parse_which(which)?,
        })
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(host) = &self.host {
            write!(f, "{host}/")?;
        }
        match &self.which {
            Which::Number(n) => write!(f, "{}@{n}", self.volume),
            Which::Latest => write!(f, "{}@latest", self.volume),
            Which::NotAfter(moment) => write!(f, "{}@{moment}", self.volume),
        }
    }
}

fn host_is_plausible(host: &str) -> bool {
    !host.is_empty()
        && host.len() <= 253
        && host
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'))
}

fn parse_which(which: &str) -> Result<Which, NameError> {
    if which == "latest" {
        return Ok(Which::Latest);
    }
    if !which.is_empty() && which.bytes().all(|b| b.is_ascii_digit()) {
        return match which.parse() {
            Ok(number) if number > 0 => Ok(Which::Number(number)),
            Ok(_) | Err(_) => Err(NameError::NotAnImage {
                text: format!("@{which}"),
            }),
        };
    }
    LocalMoment::parse(which)
        .map(Which::NotAfter)
        .map_err(|source| NameError::NotAWhich {
            which: which.to_owned(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_grammar() {
        for good in ["a", "0", "data", "web-1_x", &"a".repeat(48)] {
            assert_eq!(Name::new(good).unwrap().as_str(), good);
        }
        for bad in [
            "",
            "-a",
            "_a",
            "a/b",
            "a b",
            "ä",
            "a.b",
            &"a".repeat(49),
            "a\n",
        ] {
            assert!(Name::new(bad).is_err(), "{bad:?}");
        }
        serde_json::from_str::<Name>("\"../x\"").unwrap_err();
    }

    #[test]
    fn images_parse() {
        let image: ImageName = "web1/data@4".parse().unwrap();
        assert_eq!(
            image,
            ImageName {
                host: Some("web1".to_owned()),
                volume: Name::new("data").unwrap(),
                which: Which::Number(4)
            }
        );
        assert_eq!(image.to_string(), "web1/data@4");
        assert_eq!(
            "data@latest".parse::<ImageName>().unwrap().which,
            Which::Latest
        );
        for text in [
            "data@2026-11-17",
            "data@2026-11-17T02:10",
            "data@2026-11-17T02:10:30",
        ] {
            let image: ImageName = text.parse().unwrap();
            assert!(matches!(image.which, Which::NotAfter(_)), "{text}");
            assert_eq!(image.to_string(), text);
        }
        for bad in [
            "data",
            "data@",
            "data@0",
            "@1",
            "a/b/c@1",
            "/data@1",
            "data@x",
            "data@2026-13-01",
            "data@-1",
            "data@99999999999999999999999",
        ] {
            assert!(bad.parse::<ImageName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_slash_makes_a_path() {
        assert_eq!(
            "./repo".parse::<RepositoryRef>().unwrap(),
            RepositoryRef::Path(PathBuf::from("./repo"))
        );
        assert_eq!(
            "main".parse::<RepositoryRef>().unwrap(),
            RepositoryRef::Name(Name::new("main").unwrap())
        );
    }
}
