//! One channel's way to the destination, shared by the two threads that send on it.
//!
//! ```text
//!   Shut ──────────────▶ Open ─────────────▶ Ended        Shut ─▶ Ended: no SYNC ever came
//!     hello and first     the outlet sends     the source's channel has ended;
//!     SYNC are sent       device state         the outlet goes on to the queue's end
//! ```
//!
//! # Edges
//!
//! | edge | release side | acquire side | what it carries |
//! |---|---|---|---|
//! | open | [`Line::open`] | [`Line::is_open`] | nothing: the sender's lock orders what is sent |

use super::*;

/// The channel's hello and first SYNC are sent.
const OPEN: u32 = 1;
/// Nothing more comes from the source.
const ENDED: u32 = 2;

/// One channel's way out.
pub(super) struct Line {
    number: u32,
    /// `OPEN` and `ENDED`, each set once.
    state: AtomicU32,
    sender: Mutex<Sender>,
    /// How many threads of all lines have something to send now.
    sending: Arc<AtomicU32>,
}

impl Line {
    pub(super) fn new(number: u32, sender: Sender, sending: Arc<AtomicU32>) -> Self {
        Self {
            number,
            state: AtomicU32::new(0),
            sender: Mutex::new(sender),
            sending,
        }
    }

    pub(super) const fn number(&self) -> u32 {
        self.number
    }

    /// Sends one packet with one call.
    pub(super) fn send(&self, buffers: &mut [IoSlice<'_>]) -> Result<()> {
        self.with_sender(|sender| sender.send(buffers))
    }

    /// Runs `send` with the sender, for one packet that is sent with several calls.
    pub(super) fn with_sender<R>(&self, send: impl FnOnce(&mut Sender) -> R) -> R {
        // Relaxed: a count, for whoever has waited for long.
        self.sending.fetch_add(1, Ordering::Relaxed);
        let sent = send(&mut lock(&self.sender));
        // Relaxed: as above.
        self.sending.fetch_sub(1, Ordering::Relaxed);
        sent
    }

    /// Says that nothing more will be sent. A destination that has closed first is no failure: all
    /// was sent, and whether it has been read is for the main channel to say.
    pub(super) fn finish(&self) -> Result<()> {
        match lock(&self.sender).finish() {
            Err(error) if error.raw_os_error() == Some(nix::errno::Errno::ENOTCONN as i32) => {
                Ok(())
            }
            finished => finished,
        }
    }

    /// Says that the channel's hello and first SYNC are sent. The inlet.
    pub(super) fn open(&self) {
        // open edge, release side.
        self.state.fetch_or(OPEN, Ordering::Release);
    }

    /// Says that nothing more comes from the source. The inlet.
    pub(super) fn end(&self) {
        // Release: with the edge above.
        self.state.fetch_or(ENDED, Ordering::Release);
    }

    /// Whether device state may be sent; `None` where that is not known yet.
    pub(super) fn is_open(&self) -> Option<bool> {
        // open edge, acquire side.
        match self.state.load(Ordering::Acquire) {
            0 => None,
            state => Some(state & OPEN != 0),
        }
    }
}
