//! Each reason in words: what happened, on what evidence, and what the next backup costs. Nothing is ever damaged by it.

use blktide_types::reason::Reason;

/// A reason in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReasonText {
    /// What happened.
    pub what: &'static str,
    /// On what evidence that is said.
    pub evidence: &'static str,
    /// What an administrator may do; empty if nothing is to be done.
    pub next: &'static str,
}

/// What holds for each reason.
pub const NOTHING_DAMAGED: &str = "Nothing is damaged: neither the volume nor an earlier image.";

/// What a backup that is not incremental costs.
pub const COST: &str =
    "This backup reads and stores everything; those after it are incremental again.";

impl ReasonText {
    /// One paragraph, with the detail that was seen.
    pub fn paragraph(&self, detail: Option<&str>) -> String {
        let seen = detail
            .filter(|d| !d.is_empty())
            .map_or_else(String::new, |d| format!(" ({d})"));
        let mut text = format!(
            "{} Evidence: {}{seen}. {NOTHING_DAMAGED} {COST}",
            self.what, self.evidence
        );
        if !self.next.is_empty() {
            text = format!("{text} {}", self.next);
        }
        text
    }
}

/// The words for `reason`.
#[expect(clippy::too_many_lines, reason = "a table: one entry a reason")]
pub const fn text(reason: Reason) -> ReasonText {
    let (what, evidence, next) = match reason {
        Reason::FirstBackup => (
            "There is no image of this volume in this repository yet.",
            "the repository lists none for this volume's id",
            "",
        ),
        Reason::Asked => ("A full backup was asked for.", "the option --full", ""),
        Reason::BitmapMissing => (
            "The bitmap of what changed is not where a clean stop would have left it.",
            "the bitmap file or its marker is missing in the state folder",
            "",
        ),
        Reason::BitmapDamaged => (
            "The bitmap of what changed is damaged.",
            "the bitmap file or its marker fails its checksum",
            "Check the disk that holds the state folder.",
        ),
        Reason::BitmapOtherVolume => (
            "The bitmap file that was found belongs to another volume.",
            "its volume id is not this volume's",
            "",
        ),
        Reason::BitmapOtherSize => (
            "The bitmap file was made for another size.",
            "its volume size, block size or grain differs",
            "",
        ),
        Reason::BitmapStale => (
            "The bitmap of what changed does not reach back to the last image.",
            "it is of another life, or does not know the generation that the last image names",
            "",
        ),
        Reason::UncleanShutdown => (
            "The machine went down without a clean stop of the volume, so the bitmap of what changed was lost with its memory.",
            "the marker beside the bitmap says 'open', written in an earlier boot",
            "If it happens at every shutdown, the pre-shutdown hook (`blktidectl flush --all`) does not run.",
        ),
        Reason::ForeignWrite => (
            "The volume was written while the tracker was away.",
            "structures of its file system differ from those at the clean stop",
            "Mount the node, never the device below it.",
        ),
        Reason::ForeignWriteUnknown => (
            "The tracker was away, and nothing on this volume could show whether it was written meanwhile.",
            "no file system with a counter that every writing mount moves was found on it",
            "If nothing else ever writes this device, say `exclusive = true` in the volume's file.",
        ),
        Reason::CloneDetected => (
            "Another machine backs up a volume of the same id into this repository.",
            "the newest claim or image of this volume was made by another host",
            "Give the clone a repository of its own, or remove and add the volume there.",
        ),
        Reason::DeviceChanged => (
            "The volume lies on another device than at the last image.",
            "the device's identity or sector size differs from the last image's",
            "",
        ),
        Reason::Resized => (
            "The volume has another size than at the last image.",
            "its bytes differ from those in the last image",
            "",
        ),
        Reason::TrackingInterrupted => (
            "Tracking had a gap.",
            "the volume was attached anew in the same boot without a clean detach, or its writes passed through untracked",
            "",
        ),
        Reason::TrackerSuspect => (
            "A block that the tracker called unchanged had changed.",
            "a canary or an audit compared contents",
            "Please report it: this must not happen.",
        ),
        Reason::BaseImageGone => (
            "The last image, or something it needs, is gone from the repository.",
            "its manifest, root page or packs are not there with the recorded size",
            "See `blktidectl verify`.",
        ),
        Reason::BlockSizeChanged => (
            "The block size was changed.",
            "the last image has another one than the volume's file",
            "",
        ),
        Reason::BootNotCovered => (
            "The last writes before the boot could not be seen.",
            "the volume is written before the tracker can start and after it has stopped",
            "",
        ),
    };
    ReasonText {
        what,
        evidence,
        next,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Each reason has words of its own, and says that nothing is damaged and what it costs.
    #[test]
    fn each_reason_has_its_words() {
        let mut seen = BTreeSet::new();
        for reason in Reason::ALL {
            let text = text(*reason);
            assert!(seen.insert((text.what, text.evidence)), "{reason}");
            assert!(
                text.what.ends_with('.') && !text.evidence.ends_with('.'),
                "{reason}"
            );
            let paragraph = text.paragraph(Some("seen so"));
            for part in [NOTHING_DAMAGED, COST, "(seen so)"] {
                assert!(paragraph.contains(part), "{reason}: {paragraph}");
            }
        }
    }
}
