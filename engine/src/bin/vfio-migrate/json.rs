//! The one JSON object of a command: `docs/json.md` is its schema.
//!
//! ```text
//!   { "version": 1, "command": "send", … what the command has to say … , "error": { … } }
//!                                                                          after a failure
//! ```
//!
//! Every object begins with the version of the schema and the command's name. Any thread may take the object
//! ([`take`]); whoever takes it prints it, and nobody else does. So there is one object whatever happens: a
//! result, a failure, an interruption.
//!
//! A string shows no character that would steer a terminal: such characters are escaped, as JSON escapes
//! control characters.

use std::{
    io::{self, BufWriter, Write},
    sync::{
        OnceLock,
        atomic::{
            AtomicU8,
            Ordering::{AcqRel, Acquire},
        },
    },
};

use serde::Serialize;
use serde_json::ser::{CharEscape, Formatter, PrettyFormatter, Serializer};
use vfio_migration::text;

use crate::output::{self, Stdout};

/// The version of the schema. A key that is added keeps it; a key that goes, or means something else, does
/// not.
const VERSION: u32 = 1;

/// Nobody wants JSON.
const OFF: u8 = 0;
/// An object is wanted.
const WANTED: u8 = 1;
/// And is there, or on its way.
const TAKEN: u8 = 2;

/// Whether an object is still to be printed. Whoever takes it prints.
static OBJECT: AtomicU8 = AtomicU8::new(OFF);

/// The command's name, where the arguments have one.
static COMMAND: OnceLock<String> = OnceLock::new();

/// From now on one JSON object is to be printed, whatever happens.
pub(crate) fn want(command: Option<String>) {
    if let Some(command) = command {
        COMMAND.get_or_init(|| command);
    }
    let _off = OBJECT.compare_exchange(OFF, WANTED, AcqRel, Acquire);
}

/// Whether the object is the caller's to print. Nobody else will.
pub(crate) fn take() -> bool {
    let taken = OBJECT.compare_exchange(WANTED, TAKEN, AcqRel, Acquire);
    taken.is_ok()
}

/// What every object begins with.
#[derive(Serialize)]
struct Object<'a, T> {
    version: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    command: Option<&'a str>,
    #[serde(flatten)]
    body: &'a T,
}

/// Writes an object with a command's fields.
fn write(body: &impl Serialize, to: &mut impl Write) -> serde_json::Result<()> {
    let object = Object {
        version: VERSION,
        command: COMMAND.get().map(String::as_str),
        body,
    };
    object.serialize(&mut Serializer::with_formatter(&mut *to, Lines::default()))?;
    to.write_all(b"\n").map_err(serde_json::Error::io)
}

/// An object with a command's fields, as lines.
pub(crate) fn text(body: &impl Serialize) -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    write(body, &mut bytes)?;
    Ok(String::from_utf8(bytes)?)
}

/// Prints the object of a command, unless one has been printed.
pub(crate) fn print(body: &impl Serialize) -> anyhow::Result<()> {
    let text = text(body)?;
    if take() {
        output::print_raw(&text)?;
    }
    Ok(())
}

/// As [`print`], an object that may be too large for memory: it is printed while it is made.
pub(crate) fn print_at_length(body: &impl Serialize) -> anyhow::Result<()> {
    if take() {
        let mut stdout = BufWriter::new(io::stdout().lock());
        let written = write(body, &mut stdout).map_err(io::Error::from);
        written.and_then(|()| stdout.flush()).map_err(Stdout)?;
    }
    Ok(())
}

/// Indented lines, in which strings show no character that steers a terminal.
#[derive(Default)]
struct Lines(PrettyFormatter<'static>);

impl Formatter for Lines {
    fn write_string_fragment<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        for part in fragment.split_inclusive(|char| !text::is_printable(char)) {
            let last = part.chars().next_back();
            let Some(steers) = last.filter(|char| !text::is_printable(*char)) else {
                writer.write_all(part.as_bytes())?;
                continue;
            };
            writer.write_all(&part.as_bytes()[..part.len() - steers.len_utf8()])?;
            for unit in steers.encode_utf16(&mut [0; 2]) {
                write!(writer, "\\u{unit:04x}")?;
            }
        }
        Ok(())
    }

    fn write_char_escape<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        escape: CharEscape,
    ) -> io::Result<()> {
        self.0.write_char_escape(writer, escape)
    }

    fn begin_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.begin_array(writer)
    }

    fn end_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_array(writer)
    }

    fn begin_array_value<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.0.begin_array_value(writer, first)
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_array_value(writer)
    }

    fn begin_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.begin_object(writer)
    }

    fn end_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_object(writer)
    }

    fn begin_object_key<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.0.begin_object_key(writer, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.begin_object_value(writer)
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_object_value(writer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_steers_a_terminal_is_escaped_and_reads_the_same() {
        for string in [
            "plain",
            "",
            "\u{202e}",
            "a\u{202e}b\u{1b}[31m\n\"\u{e0001}",
            "é\u{85}",
        ] {
            let body = serde_json::json!({ "string": string, "list": [1, [], {}] });
            let text = text(&body).expect("JSON");
            let shown = |char| char == '\n' || text::is_printable(char);
            assert!(text.chars().all(shown), "{text:?}");
            let read: serde_json::Value = serde_json::from_str(&text).expect("JSON");
            assert_eq!(read["string"], string);
            assert_eq!(read["version"], VERSION);
        }
    }
}
