//! Text that a peer has chosen, before it is shown: a terminal may act on a character instead of showing
//! it.
//!
//! Such characters are the control characters, and invisible ones. An invisible character may change the
//! order in which others are shown (U+202A to U+202E, U+2066 to U+2069, U+200E, U+200F, U+061C), or hide
//! others. The standard library's table decides which they are: those that it escapes in the debug output
//! of a text.

use std::fmt::{self, Write};

/// Whether a terminal shows the character, and does nothing else with it.
///
/// ```
/// use vfio_migration::text::is_printable;
///
/// assert!("0000:00:03.0/vfio é \"\\".chars().all(is_printable));
/// assert!(!['\n', '\u{1b}', '\u{9b}', '\u{202e}', '\u{61c}'].into_iter().any(is_printable));
/// ```
#[must_use]
pub fn is_printable(char: char) -> bool {
    // Not first, where a mark that belongs on the character before it is escaped too.
    let mut text = [b'x', 0, 0, 0, 0];
    let len = char.encode_utf8(&mut text[1..]).len();
    let text = std::str::from_utf8(&text[..=len]).unwrap_or_default();
    matches!(char, '"' | '\'' | '\\') || text.escape_debug().count() == 2
}

/// A text whose characters are all printable: each other is escaped, like `\u{202e}`.
///
/// ```
/// use vfio_migration::text::Printable;
///
/// assert_eq!(Printable("a\u{202e}b\n").to_string(), "a\\u{202e}b\\n");
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Printable<'a>(pub &'a str);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|char| {
            if is_printable(char) {
                f.write_char(char)
            } else {
                write!(f, "{}", char.escape_default())
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_steers_a_terminal_is_escaped_and_what_it_shows_is_not() {
        let steering = ('\0'..' ')
            .chain('\u{7f}'..='\u{9f}')
            .chain('\u{200b}'..='\u{200f}')
            .chain('\u{2028}'..='\u{202e}')
            .chain('\u{2060}'..='\u{206f}')
            .chain([
                '\u{ad}',
                '\u{61c}',
                '\u{180e}',
                '\u{feff}',
                '\u{fffb}',
                '\u{e0001}',
            ]);
        for char in steering {
            assert!(!is_printable(char), "{char:?}");
            let text = Printable(&format!("a{char}b")).to_string();
            assert!(text.chars().all(is_printable), "{text:?}");
        }
        for text in [
            "",
            " ~\"'\\",
            "Zürich, 東京, Ελλάδα, עברית",
            "e\u{301}",
            "→ ─ 🙂",
        ] {
            assert_eq!(Printable(text).to_string(), text);
        }
    }
}
