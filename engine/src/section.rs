//! A device's part of the main channel: tags, and what stands between them.
//!
//! ```text
//!   load_state() reads one piece; the sink is the device
//!
//!   ┌──▶ tag ─┬─ DATA ── be64 size ── size bytes ──▶ sink.write ──┐
//!   │         │                                                   │
//!   │ ◀───────┴───────────────────────────────────────────────────┘
//!   │
//!   ├─ END_OF_STATE ──────────────────────────────────────────────▶ the piece's end
//!   ├─ SETUP ── END_OF_STATE ─────────────────────────────────────▶
//!   ├─ CONFIG ── the config's bytes ──▶ sink.config ── END_OF_STATE ▶
//!   ├─ INIT_DATA_SENT ──▶ sink.init_data_sent ────────────────────▶
//!   ├─ CONFIG_LOAD_READY ──▶ sink.config_load_ready ──────────────▶
//!   ├─ SETUP_OVER_CHANNELS ── END_OF_STATE ──▶ sink.setup ────────▶
//!   └─ PRECOPY_SENT ── be32 count ──▶ sink.precopy_sent, and the next tag
//! ```
//!
//! Only this engine uses the last two tags, and only if PRE_COPY data goes over the channels.
//!
//! The VMM's thread that reads the main channel calls this module, with the main channel at the device's
//! part: past the section's header, before its footer. A part has no length; its last tag ends it.
//! [`Writer`] emits the same parts in the order of a migration:
//!
//! | step | emits |
//! |---|---|
//! | setup | SETUP, then, once the device's state has changed, END |
//! | iterate | one DATA block or none, then END, or once INIT_DATA_SENT in its place |
//! | setup and iterate, over the channels | SETUP_OVER_CHANNELS, then END; no DATA, and PRECOPY_SENT before INIT_DATA_SENT |
//! | complete | DATA blocks, then END; with multifd transfer END alone |
//! | config | CONFIG, the bytes, END; with multifd transfer END or CONFIG_LOAD_READY alone |

use std::io::{self, Read, Write};

pub use crate::wire::Tag;
use crate::{
    error::{Error, ErrorKind, Phase, Result, Violation},
    host::zeroed,
    wire::TAG_LEN,
};

/// The most of a DATA block that is in memory at a time, in bytes.
pub const CHUNK: usize = 64 << 10;

pub(crate) fn broken(violation: Violation) -> Error {
    Error::protocol(violation).in_phase(Phase::Section)
}

pub(crate) fn failed(error: io::Error) -> Error {
    Error::new(ErrorKind::Channel, Phase::Section).caused_by(error)
}

/// An input that knows how far it has been read, so that an error can say where it ends.
#[derive(Debug)]
pub(crate) struct Counted<R> {
    input: R,
    offset: u64,
    ended: bool,
}

impl<R: Read> Counted<R> {
    pub(crate) const fn new(input: R) -> Self {
        Self {
            input,
            offset: 0,
            ended: false,
        }
    }

    /// How many bytes have been read.
    pub(crate) const fn offset(&self) -> u64 {
        self.offset
    }

    /// The input itself, wherever it stands now.
    pub(crate) fn into_inner(self) -> R {
        self.input
    }

    pub(crate) fn truncated(&self) -> Error {
        let offset = self.offset;
        broken(Violation::SectionTruncated { offset })
    }

    /// Fills `bytes`.
    pub(crate) fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.read_exact(bytes).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => self.truncated(),
            _ => failed(error),
        })
    }

    /// Reads a field.
    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    /// Reads one byte, or `None` where the input ends.
    pub(crate) fn byte_or_end(&mut self) -> Result<Option<u8>> {
        let mut byte = [0];
        loop {
            return match self.read(&mut byte) {
                Ok(0) => Ok(None),
                Ok(_) => Ok(Some(byte[0])),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => Err(failed(error)),
            };
        }
    }

    /// Reads `len` bytes, which the caller has bounded.
    pub(crate) fn take_bytes(&mut self, len: u32) -> Result<Vec<u8>> {
        let mut bytes = zeroed(len as usize, "memory for what the main channel says")?;
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    /// Reads a tag.
    fn tag(&mut self) -> Result<Tag> {
        let bytes: [u8; TAG_LEN] = self.array()?;
        let value = u64::from_be_bytes(bytes);
        Tag::decode(bytes).ok_or_else(|| broken(Violation::SectionTag(value)))
    }

    /// Reads the tag that ends a piece.
    fn end_of_state(&mut self) -> Result<()> {
        match self.tag()? {
            Tag::EndOfState => Ok(()),
            tag => Err(broken(Violation::SectionTag(tag.value()))),
        }
    }

    /// Hands a DATA block to the sink, piece by piece, as the bytes come.
    fn data(&mut self, len: u64, sink: &mut impl SectionSink) -> Result<()> {
        let mut left = len;
        // The peer's size bounds the memory from above only.
        let chunk = usize::try_from(len).map_or(CHUNK, |len| len.min(CHUNK));
        let mut buffer = zeroed(chunk, "memory for a section's data")?;
        while left > 0 {
            let most = usize::try_from(left).map_or(chunk, |left| left.min(chunk));
            let count = match self.read(&mut buffer[..most]) {
                Ok(0) => return Err(self.truncated()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(failed(error)),
            };
            sink.write(&buffer[..count])?;
            left -= count as u64;
        }
        Ok(())
    }
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(bytes)?;
        self.offset += count as u64;
        self.ended |= count == 0 && !bytes.is_empty();
        Ok(count)
    }
}

/// The device that a part of the main channel is for, as [`load_state`] sees it.
pub trait SectionSink {
    /// Takes the next bytes for the data fd, at most [`CHUNK`] of them, and writes all of them.
    ///
    /// # Errors
    ///
    /// The device's. It ends the piece, and is passed on as it is.
    fn write(&mut self, bytes: &[u8]) -> Result<()>;

    /// Loads the device's config: takes exactly the config's bytes from `input`, which holds more
    /// than them. That the end tag comes next is checked afterwards.
    ///
    /// # Errors
    ///
    /// The loader's. Where `input` had ended before it, that is reported instead.
    fn config(&mut self, input: &mut dyn Read) -> Result<()>;

    /// The migration has been set up; `over_channels` says that its PRE_COPY data comes over the
    /// multifd channels. Returns whether that was agreed on.
    ///
    /// # Errors
    ///
    /// A better reason than that the tag was not asked for.
    fn setup(&mut self, over_channels: bool) -> Result<bool> {
        Ok(!over_channels)
    }

    /// So many packets of the device's PRE_COPY data have been sent over the channels. Returns
    /// whether that was asked for.
    ///
    /// # Errors
    ///
    /// As for [`SectionSink::setup`].
    fn precopy_sent(&mut self, count: u32) -> Result<bool> {
        let _ = count;
        Ok(false)
    }

    /// The peer has sent the device's initial data: approves the switchover, and says whether that
    /// was asked for. It was not, and is a broken rule, where the device has no precopy or
    /// switchover-ack is not in use.
    ///
    /// # Errors
    ///
    /// Whatever keeps the approval from being sent.
    fn init_data_sent(&mut self) -> Result<bool> {
        Ok(false)
    }

    /// What the config depends on has been loaded: lets the config be loaded, and says whether that
    /// was asked for. It was not, and is a broken rule, where multifd transfer is not in use, where
    /// config-after-iterables is off, and the second time.
    ///
    /// # Errors
    ///
    /// Whatever keeps the config's loader from being told.
    fn config_load_ready(&mut self) -> Result<bool> {
        Ok(false)
    }

    /// For a trace: a tag has been read, and with [`Tag::Data`] the block's length in bytes.
    fn on_tag(&mut self, tag: Tag, data_len: u64) {
        let _ = (tag, data_len);
    }

    /// For a trace: a DATA block of so many bytes has been written, or has failed.
    fn on_data(&mut self, data_len: u64, taken: &Result<()>) {
        let _ = (data_len, taken);
    }
}

/// What one call of [`load_state`] has read.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Piece {
    /// The length of all its DATA blocks, in bytes.
    pub data_len: u64,
    /// What ended it. [`Tag::Setup`], [`Tag::SetupOverChannels`] and [`Tag::Config`] stand for
    /// themselves and the [`Tag::EndOfState`] behind them; [`Tag::Data`] and [`Tag::PrecopySent`]
    /// never stand here.
    pub end: Tag,
}

/// Reads one piece of a device's state, up to and with the tag that ends it, and not a byte more.
///
/// It blocks as `input` does. A block's size is the peer's word and allocates nothing: the bytes
/// pass through a buffer of at most [`CHUNK`].
///
/// ```
/// use std::io::Read;
/// use vfio_migration::{
///     Result,
///     section::{Piece, SectionSink, Tag, Writer, load_state},
/// };
///
/// struct Device(Vec<u8>);
///
/// impl SectionSink for Device {
///     fn write(&mut self, bytes: &[u8]) -> Result<()> {
///         self.0.extend(bytes);
///         Ok(())
///     }
///
///     fn config(&mut self, _input: &mut dyn Read) -> Result<()> {
///         unreachable!("the writer below sends no config")
///     }
/// }
///
/// let mut main_channel = Vec::new();
/// Writer::new(&mut main_channel).iterate(b"precopy", false)?;
///
/// let mut device = Device(Vec::new());
/// let piece = load_state(&mut &main_channel[..], &mut device)?;
/// assert_eq!(piece, Piece { data_len: 7, end: Tag::EndOfState });
/// assert_eq!(device.0, b"precopy");
/// # Ok::<(), vfio_migration::Error>(())
/// ```
///
/// # Errors
///
/// All in [`Phase::Section`] but the sink's own. [`Violation::SectionTag`] for an unknown tag and
/// for one that cannot stand here; [`Violation::ConfigFraming`] where a config does not end where
/// its loader stopped; [`Violation::SectionTruncated`] with the number of bytes since the call;
/// [`ErrorKind::Channel`] where `input` fails.
pub fn load_state<R>(input: &mut R, sink: &mut impl SectionSink) -> Result<Piece>
where
    R: Read + ?Sized,
{
    let mut input = Counted::new(input);
    let mut data_len = 0_u64;
    let end = loop {
        let tag = input.tag()?;
        if tag == Tag::Data {
            let len = u64::from_be_bytes(input.array()?);
            sink.on_tag(tag, len);
            let taken = input.data(len, sink);
            sink.on_data(len, &taken);
            taken?;
            data_len = data_len.saturating_add(len);
            continue;
        }
        sink.on_tag(tag, 0);
        let asked_for = match tag {
            Tag::Setup | Tag::SetupOverChannels => {
                input.end_of_state()?;
                sink.setup(tag == Tag::SetupOverChannels)?
            }
            Tag::PrecopySent => {
                let count = u32::from_be_bytes(input.array()?);
                if sink.precopy_sent(count)? {
                    continue;
                }
                false
            }
            Tag::Config => load_config(&mut input, sink).map(|()| true)?,
            Tag::InitDataSent => sink.init_data_sent()?,
            Tag::ConfigLoadReady => sink.config_load_ready()?,
            Tag::EndOfState | Tag::Data => true,
        };
        if !asked_for {
            return Err(broken(Violation::SectionTag(tag.value())));
        }
        break tag;
    };
    Ok(Piece { data_len, end })
}

fn load_config(input: &mut Counted<impl Read>, sink: &mut impl SectionSink) -> Result<()> {
    sink.config(input).map_err(|error| {
        // A loader whose input ends knows less about it than is known here.
        if input.ended {
            input.truncated()
        } else {
            error
        }
    })?;
    if input.array()? == Tag::EndOfState.encode() {
        return Ok(());
    }
    Err(broken(Violation::ConfigFraming(
        "no END_OF_STATE where its loader stopped",
    )))
}

/// Writes a device's parts of the main channel.
///
/// It writes straight through, in pieces as small as a tag: an output that is slow at that should
/// be buffered.
///
/// ```
/// use vfio_migration::section::{Tag, Writer};
///
/// let mut main_channel = Vec::new();
/// let mut writer = Writer::new(&mut main_channel);
/// writer.setup()?;
/// // Here the device's state changes.
/// writer.end()?;
/// assert_eq!(main_channel, [Tag::Setup.encode(), Tag::EndOfState.encode()].concat());
/// # Ok::<(), vfio_migration::Error>(())
/// ```
#[derive(Debug)]
pub struct Writer<W> {
    output: W,
}

// Each method's only error is the output's: `ErrorKind::Channel` in `Phase::Section`.
impl<W: Write> Writer<W> {
    /// Writes to `output`, which stands past the section's header.
    pub const fn new(output: W) -> Self {
        Self { output }
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.output.write_all(bytes).map_err(failed)
    }

    fn tag(&mut self, tag: Tag) -> Result<()> {
        self.put(&tag.encode())
    }

    /// The setup part's beginning. Its [`Writer::end`] comes after the device's state has changed.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Channel`].
    pub fn setup(&mut self) -> Result<()> {
        self.tag(Tag::Setup)
    }

    /// In the place of [`Writer::setup`], where PRE_COPY data goes over the multifd channels.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Channel`].
    pub fn setup_over_channels(&mut self) -> Result<()> {
        self.tag(Tag::SetupOverChannels)
    }

    /// How many packets of PRE_COPY data have been sent over the multifd channels so far: before an
    /// iteration's end that says that the initial data has been.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Channel`].
    pub fn precopy_sent(&mut self, count: u32) -> Result<()> {
        self.tag(Tag::PrecopySent)?;
        self.put(&count.to_be_bytes())
    }

    /// A DATA block: bytes that were read from the data fd, and may be none.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Channel`].
    pub fn data_block(&mut self, data: &[u8]) -> Result<()> {
        self.tag(Tag::Data)?;
        self.put(&(data.len() as u64).to_be_bytes())?;
        self.put(data)
    }

    /// The end of a part.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Channel`].
    pub fn end(&mut self) -> Result<()> {
        self.tag(Tag::EndOfState)
    }

    /// One iteration's whole part: a DATA block where there is `data`, and the end, which is
    /// INIT_DATA_SENT where `init_data_sent` says so.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Channel`].
    pub fn iterate(&mut self, data: &[u8], init_data_sent: bool) -> Result<()> {
        if !data.is_empty() {
            self.data_block(data)?;
        }
        if init_data_sent {
            self.tag(Tag::InitDataSent)
        } else {
            self.end()
        }
    }

    /// A whole part without content: the completion's and the config's where multifd carries both.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Channel`].
    pub fn dummy(&mut self) -> Result<()> {
        self.end()
    }

    /// The config's whole part, where multifd does not carry it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Channel`].
    pub fn config(&mut self, config: &[u8]) -> Result<()> {
        self.tag(Tag::Config)?;
        self.put(config)?;
        self.end()
    }

    /// The config's whole part where config-after-iterables is on: its load may begin.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Channel`].
    pub fn config_load_ready(&mut self) -> Result<()> {
        self.tag(Tag::ConfigLoadReady)
    }
}

#[cfg(test)]
mod tests;
