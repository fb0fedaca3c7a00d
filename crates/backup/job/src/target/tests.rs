//! Each refusal, and their order.

use super::*;

fn good() -> TargetFacts {
    TargetFacts {
        kind: TargetKind::Device,
        bytes: 1 << 20,
        logical_sector_bytes: 512,
        mounted_at: None,
        holds_repository: false,
        in_use_by: None,
        signature: None,
    }
}

const YES: Contents = Contents::Overwrite;

fn code(target: &TargetFacts, contents: Contents) -> Option<&'static str> {
    check(target, 1 << 20, 512, contents)
        .err()
        .map(|r| r.code())
}

/// trap TD6: a 512-sector image on a 4Kn disk, and the reverse, is refused; to a file it may be restored.
#[test]
fn other_sector_sizes_are_refused_on_devices() {
    let mut target = good();
    target.logical_sector_bytes = 4096;
    assert_eq!(code(&target, YES), Some("target_sector_size"));
    target.logical_sector_bytes = 512;
    assert_eq!(
        check(&target, 1 << 20, 4096, YES).unwrap_err().code(),
        "target_sector_size"
    );
    target.kind = TargetKind::NewFile;
    assert_eq!(check(&target, 1 << 20, 4096, YES), Ok(()));
}

/// What is mounted, in use or too small is refused whatever is allowed.
#[test]
fn overwrite_does_not_help_what_is_in_use_or_too_small() {
    assert_eq!(code(&good(), YES), None);
    let mounted = TargetFacts {
        mounted_at: Some("/srv".into()),
        ..good()
    };
    assert_eq!(code(&mounted, YES), Some("target_mounted"));
    let used = TargetFacts {
        in_use_by: Some("md0".into()),
        ..good()
    };
    assert_eq!(code(&used, YES), Some("target_in_use"));
    let small = TargetFacts {
        bytes: (1 << 20) - 1,
        ..good()
    };
    assert_eq!(code(&small, YES), Some("target_too_small"));
    let file = TargetFacts {
        kind: TargetKind::File,
        ..small
    };
    assert_eq!(code(&file, YES), None, "a file grows");
    let repository = TargetFacts {
        holds_repository: true,
        ..good()
    };
    assert_eq!(code(&repository, YES), Some("target_holds_repository"));
}

#[test]
fn what_it_holds_is_written_over_only_when_asked() {
    let full = TargetFacts {
        signature: Some("ext4 file system".into()),
        ..good()
    };
    assert_eq!(code(&full, Contents::Keep), Some("target_not_empty"));
    assert_eq!(code(&full, YES), None);
}
