//! The tables of `docs/format.md` come from the code: one declaration, one truth.

use anyhow::{Context, Result, ensure};
use blktide_format::Layout;
use std::fs;

const PAGE: &str = "docs/format.md";

/// Compares the page with the code; with `write`, makes it so.
pub fn run(write: bool) -> Result<()> {
    let old = fs::read_to_string(PAGE)?;
    let new = filled(&old, blktide_format::LAYOUTS)?;
    if write {
        #[expect(clippy::disallowed_methods, reason = "a document in the work tree")]
        fs::write(PAGE, &new)?;
    }
    ensure!(
        write || new == old,
        "{PAGE} is not what the code says: cargo xtask format --write"
    );
    Ok(())
}

/// `page` with each layout's table between its two marks; layouts stand in the page in their order.
fn filled(page: &str, layouts: &[Layout]) -> Result<String> {
    let mut new = String::new();
    let mut rest = page;
    for layout in layouts {
        let open = format!("<!-- layout {} -->\n", layout.name);
        let (before, after) = rest.split_once(&open).with_context(|| {
            format!("{PAGE}: no line `{}`, or not in its place", open.trim_end())
        })?;
        let (_, tail) = after
            .split_once("<!-- end -->")
            .with_context(|| format!("{PAGE}: {}: no line `<!-- end -->`", layout.name))?;
        new += before;
        new += &open;
        new += &layout.to_markdown();
        new += "<!-- end -->";
        rest = tail;
    }
    ensure!(
        !rest.contains("<!-- layout "),
        "{PAGE}: a table that no layout of the code fills"
    );
    new += rest;
    Ok(new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use blktide_format::Field;

    const ONE: Layout = Layout {
        name: "One",
        size: 8,
        fields: &[Field {
            name: "magic",
            offset: 0,
            size: 8,
            doc: " Magic.",
        }],
    };

    #[test]
    fn a_table_is_filled_and_a_missing_mark_told() {
        let page = "# A\n<!-- layout One -->\nold\n<!-- end -->\ntail\n";
        let new = filled(page, &[ONE]).unwrap();
        assert!(new.contains("| 0 | 8 | `magic` | Magic. |") && !new.contains("old"));
        assert_eq!(filled(&new, &[ONE]).unwrap(), new);
        assert!(filled("# A\n", &[ONE]).is_err());
        assert!(filled(page, &[]).is_err());
    }
}
