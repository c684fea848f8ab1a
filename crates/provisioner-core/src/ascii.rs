//! What others wrote, in a form that can go to a terminal.

/// `text` with everything escaped that is not printable ASCII.
#[must_use]
pub(crate) fn printable(text: &str) -> String {
    text.chars().flat_map(|c| if matches!(c, ' '..='~') { vec![c] } else { c.escape_default().collect() }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_wrote_is_shown_in_printable_ascii() {
        assert_eq!(printable("web1 \u{1b}[31m\nü"), "web1 \\u{1b}[31m\\n\\u{fc}");
    }
}
