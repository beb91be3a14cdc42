//! Channels: one connection of a migration each.

#![expect(unsafe_code, reason = "the functions' names are exported")]

use std::{
    ffi::{c_int, c_void},
    mem::MaybeUninit,
    sync::Mutex,
};

use vfio_migration::{Channel, Result};

use crate::{
    border::{adopt, given, guard, hand_out, lock, misuse, quiet},
    callbacks::{CRam, CStream, RamOps, StreamOps},
    failure::{Code, ErrorHandle},
};

/// One connection of a migration, not yet in use. `vfm_…_add_channel` takes it out of its handle, and owns the
/// connection from then on; the handle is freed with `vfm_channel_free` before or after.
pub struct ChannelHandle(Mutex<Option<Channel>>);

impl ChannelHandle {
    pub(crate) fn take(&self) -> Result<Channel> {
        let channel = lock(&self.0).take();
        channel.ok_or_else(|| misuse("channel: it has been given away"))
    }

    fn change(&self, change: impl FnOnce(Channel) -> Result<Channel>) -> Result<()> {
        let mut place = lock(&self.0);
        let channel = place.take();
        let channel = channel.ok_or_else(|| misuse("channel: it has been given away"))?;
        *place = Some(change(channel)?);
        Ok(())
    }
}

/// Makes a channel of a connected stream socket of any family. It is the library's from here on, which sets it to
/// block, shuts it down and closes it; where this call fails it stays the caller's. The options that find a
/// vanished host (SO_KEEPALIVE, TCP_USER_TIMEOUT) are the caller's to set. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_channel_from_fd(
    socket: c_int,
    channel: Option<&mut MaybeUninit<*mut ChannelHandle>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let channel = given(channel, "channel: NULL")?;
        let socket = adopt(socket, "socket: it is not open")?;
        hand_out(channel, ChannelHandle(Mutex::new(Some(socket.into()))));
        Ok(())
    })
}

/// Makes a channel of the caller's own stream. `opaque` is the library's until `release`, which is called also where
/// this call fails, but for a NULL `ops`. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_channel_from_stream(
    ops: Option<&StreamOps>,
    opaque: *mut c_void,
    channel: Option<&mut MaybeUninit<*mut ChannelHandle>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let stream = CStream::new(given(ops, "ops: NULL")?, opaque)?;
        let channel = given(channel, "channel: NULL")?;
        let hangs_up = stream.clone();
        let made =
            Channel::from_stream_with_finish(stream, CStream::finish, move || hangs_up.hang_up());
        hand_out(channel, ChannelHandle(Mutex::new(Some(made))));
        Ok(())
    })
}

/// Hands the channel's RAM and SYNC packets to `ops`, for a load; without, a RAM packet is an error. `opaque` as for
/// `vfm_channel_from_stream`. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_channel_set_ram(
    channel: Option<&ChannelHandle>,
    ops: Option<&RamOps>,
    opaque: *mut c_void,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let sink = CRam::new(given(ops, "ops: NULL")?, opaque)?;
        let channel = given(channel, "channel: NULL")?;
        channel.change(|channel| Ok(channel.with_ram_sink(sink)))
    })
}

/// Sets the target's page size in bytes, on which RAM packets depend. Default: 4096. Where it is none, the channel is
/// lost. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_channel_set_page_size(
    channel: Option<&ChannelHandle>,
    bytes: u32,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let channel = given(channel, "channel: NULL")?;
        vfio_migration::wire::PageSize::new(bytes)?;
        channel.change(|channel| channel.with_page_size(bytes))
    })
}

/// Frees a channel, and closes the connection where nothing has taken it. NULL is nothing. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_channel_free(channel: Option<Box<ChannelHandle>>) {
    quiet((), || drop(channel));
}
