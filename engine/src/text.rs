//! Text that a peer has chosen, before it is shown: a terminal may act on a character instead of showing
//! it.
//!
//! Such characters are the control characters, and invisible ones. An invisible character may change the
//! order in which others are shown (U+202A to U+202E, U+2066 to U+2069, U+200E, U+200F, U+061C), or hide
//! others. `INVISIBLE` lists them. The list is the crate's own, so that a text looks the same whichever
//! toolchain built the crate.

use std::{
    fmt::{self, Write},
    ops::RangeInclusive,
};

/// Characters that take no ink, from Unicode 16: format characters (Cf), default-ignorable code points,
/// separators other than the blank (Zs, Zl, Zp), and private use (Co). In order.
const INVISIBLE: &[RangeInclusive<char>] = &[
    '\u{a0}'..='\u{a0}',
    '\u{ad}'..='\u{ad}',
    '\u{34f}'..='\u{34f}',
    '\u{600}'..='\u{605}',
    '\u{61c}'..='\u{61c}',
    '\u{6dd}'..='\u{6dd}',
    '\u{70f}'..='\u{70f}',
    '\u{890}'..='\u{891}',
    '\u{8e2}'..='\u{8e2}',
    '\u{115f}'..='\u{1160}',
    '\u{1680}'..='\u{1680}',
    '\u{17b4}'..='\u{17b5}',
    '\u{180b}'..='\u{180f}',
    '\u{2000}'..='\u{200f}',
    '\u{2028}'..='\u{202f}',
    '\u{205f}'..='\u{206f}',
    '\u{3000}'..='\u{3000}',
    '\u{3164}'..='\u{3164}',
    '\u{e000}'..='\u{f8ff}',
    '\u{fe00}'..='\u{fe0f}',
    '\u{feff}'..='\u{feff}',
    '\u{ffa0}'..='\u{ffa0}',
    '\u{fff0}'..='\u{fffb}',
    '\u{110bd}'..='\u{110bd}',
    '\u{110cd}'..='\u{110cd}',
    '\u{13430}'..='\u{1343f}',
    '\u{1bca0}'..='\u{1bca3}',
    '\u{1d173}'..='\u{1d17a}',
    '\u{e0000}'..='\u{10ffff}',
];

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
    !char.is_control() && !INVISIBLE.iter().any(|range| range.contains(&char))
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
    fn the_list_is_in_order_and_without_overlap() {
        assert!(INVISIBLE.is_sorted_by(|low, high| low.end() < high.start()));
    }

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
                '\u{a0}',
                '\u{3000}',
                '\u{e000}',
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
