//! The main channel and the return path, in QEMU's format, for a VMM that has none yet.
//!
//! Longer than other files: the two ways of one format, and most of it is the header's text.

#![expect(unsafe_code, reason = "the functions' names are exported")]

use std::{
    ffi::{CString, c_char, c_void},
    mem::MaybeUninit,
    ptr,
    sync::{Mutex, MutexGuard},
};

use vfio_migration::{
    Result,
    stream::{Command, Event, MainChannelOrder, Reader, Reply, Section, SectionKind, Writer},
};

use crate::{
    border::{bytes, given, guard, hand_out, lock_at_once, misuse, quiet, room, text},
    callbacks::{Input, Output, Sink, Source},
    device::device_id,
    failure::{Code, ErrorHandle, c_text},
    incoming::{Body, IncomingHandle},
};

/// Where in its life a part of a section is.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub enum SectionCode {
    /// The first part: the set-up.
    Start = 1,
    /// A further part: an iteration.
    Part = 2,
    /// The last part: the state.
    End = 3,
    /// The only part: the config.
    Full = 4,
}

pub(crate) fn section_kind(kind: u32) -> Result<SectionKind> {
    match kind {
        1 => Ok(SectionKind::Start),
        2 => Ok(SectionKind::Part),
        3 => Ok(SectionKind::End),
        4 => Ok(SectionKind::Full),
        _ => Err(misuse("kind: no section's")),
    }
}

/// The source may be answered on the return path.
pub const VFM_COMMAND_OPEN_RETURN_PATH: u16 = 1;
/// Asks for VFM_REPLY_PONG with the same value.
pub const VFM_COMMAND_PING: u16 = 2;
/// The loads may begin.
pub const VFM_COMMAND_SWITCHOVER_START: u16 = 11;

/// The destination sends no more; its value is the verdict: 0, all is loaded.
pub const VFM_REPLY_SHUT: u16 = 1;
/// The answer to VFM_COMMAND_PING, with its value.
pub const VFM_REPLY_PONG: u16 = 2;
/// The initial data is loaded.
pub const VFM_REPLY_SWITCHOVER_ACK: u16 = 7;

/// What the main channel brings.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub enum EventCode {
    /// The channel has ended, behind its EOF.
    Ended = 0,
    /// The source's machine: `name`.
    Configuration = 1,
    /// A section's header. Its body is next (`vfm_main_reader_load`, or `…_read` and `…_footer`).
    Section = 2,
    /// A command: `command`, `value` or `payload`.
    Command = 3,
    /// The end of the VM's state: the permission to start. A description may follow.
    Eof = 4,
    /// The sections as JSON, for people: `payload`.
    Description = 5,
}

/// An event of the main channel. What it points to is the reader's, until the next call with the reader.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct MainEvent {
    /// What it is: `enum vfm_event_code`.
    pub kind: u32,
    /// Section: which part it is, `enum vfm_section_kind`.
    pub section_kind: u32,
    /// Section: its number.
    pub section_id: u32,
    /// Section: the instance id of its owner.
    pub instance: u32,
    /// Section: the version of its body, 1 for a VFIO device.
    pub version: u32,
    /// Command: its number, `VFM_COMMAND_…`.
    pub command: u32,
    /// Command: the value of a PING.
    pub value: u32,
    /// Section: the idstr of its owner. Configuration: the machine. Otherwise NULL.
    pub name: *const c_char,
    /// Description, and a command that has no name here: its bytes. Otherwise NULL.
    pub payload: *const c_void,
    /// How many.
    pub payload_len: usize,
}

impl MainEvent {
    const fn of(kind: EventCode) -> Self {
        Self {
            kind: kind as u32,
            section_kind: 0,
            section_id: 0,
            instance: 0,
            version: 0,
            command: 0,
            value: 0,
            name: ptr::null(),
            payload: ptr::null(),
            payload_len: 0,
        }
    }
}

struct Reading {
    reader: Reader<Source>,
    order: Option<MainChannelOrder>,
    section: Option<Section>,
    name: CString,
    payload: Vec<u8>,
}

/// Reads a main channel event by event, and no byte beyond one. One thread at a time: a second is refused. Free it with
/// `vfm_main_reader_free`.
pub struct MainReaderHandle(Mutex<Reading>);

impl MainReaderHandle {
    fn lock(&self) -> Result<MutexGuard<'_, Reading>> {
        lock_at_once(&self.0, "reader: another thread is in a call with it")
    }
}

/// Opens a main channel for reading, and reads its first eight bytes. `input` must be good until the reader is freed.
/// `incoming` may be NULL; otherwise the reader refuses sections of its devices, and a switchover, where they may not
/// stand. Waits for the bytes. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_main_reader_open(
    input: Input,
    incoming: Option<&IncomingHandle>,
    reader: Option<&mut MaybeUninit<*mut MainReaderHandle>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let source = Source::new(input)?;
        let reader = given(reader, "reader: NULL")?;
        let made = Reading {
            reader: Reader::open(source)?,
            order: incoming.map(|incoming| MainChannelOrder::new(incoming.ids())),
            section: None,
            name: CString::default(),
            payload: Vec::new(),
        };
        hand_out(reader, MainReaderHandle(Mutex::new(made)));
        Ok(())
    })
}

/// Reads the next event. Waits for its bytes. A caller who expects no description stops at VFM_EVENT_CODE_EOF: the
/// connection may stay open behind it.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_main_reader_next(
    reader: Option<&MainReaderHandle>,
    event: Option<&mut MaybeUninit<MainEvent>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let reader = given(reader, "reader: NULL")?;
        let event = given(event, "event: NULL")?;
        let mut reading = reader.lock()?;
        let Some(next) = reading.reader.next_event()? else {
            event.write(MainEvent::of(EventCode::Ended));
            return Ok(());
        };
        if let Some(order) = &mut reading.order {
            order.event(&next)?;
        }
        event.write(reading.describe(next));
        Ok(())
    })
}

impl Reading {
    /// An event for C, which borrows from this.
    fn describe(&mut self, event: Event) -> MainEvent {
        let mut told = MainEvent::of(match event {
            Event::Configuration { .. } => EventCode::Configuration,
            Event::Section(_) => EventCode::Section,
            Event::Command(_) => EventCode::Command,
            Event::Eof => EventCode::Eof,
            _ => EventCode::Description,
        });
        match event {
            Event::Configuration { name } => {
                self.name = c_text(&name);
                told.name = self.name.as_ptr();
            }
            Event::Section(section) => {
                self.name = c_text(section.owner.idstr());
                told.name = self.name.as_ptr();
                told.section_kind = section.kind as u32;
                told.section_id = section.id;
                told.instance = section.owner.instance();
                told.version = section.version;
                self.section = Some(section);
            }
            Event::Command(command) => match command {
                Command::OpenReturnPath => told.command = VFM_COMMAND_OPEN_RETURN_PATH.into(),
                Command::SwitchoverStart => told.command = VFM_COMMAND_SWITCHOVER_START.into(),
                Command::Ping(value) => {
                    told.command = VFM_COMMAND_PING.into();
                    told.value = value;
                }
                Command::Other { command, payload } => {
                    told.command = command.into();
                    self.keep(payload, &mut told);
                }
                _ => {}
            },
            Event::Description(json) => self.keep(json, &mut told),
            _ => {}
        }
        told
    }

    fn keep(&mut self, payload: Vec<u8>, told: &mut MainEvent) {
        self.payload = payload;
        told.payload = self.payload.as_ptr().cast();
        told.payload_len = self.payload.len();
    }
}

/// Loads the body of the section whose header was read last into its device, and reads its footer. `body` may be NULL.
/// Refused for a section of another owner's. Waits for the main channel and the driver.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_main_reader_load(
    reader: Option<&MainReaderHandle>,
    incoming: Option<&IncomingHandle>,
    body: Option<&mut MaybeUninit<Body>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let reader = given(reader, "reader: NULL")?;
        let incoming = given(incoming, "incoming: NULL")?;
        let mut reading = reader.lock()?;
        let section = reading.section.take();
        let section = section.ok_or_else(|| misuse("reader: there is no section to read"))?;
        let piece = incoming.running(|it| {
            it.device(&section.owner)?
                .load_state(reading.reader.body()?)
        })?;
        if let Some(order) = &reading.order {
            order.body(&section, &piece)?;
        }
        reading.reader.footer()?;
        if let Some(body) = body {
            body.write(piece.into());
        }
        Ok(())
    })
}

/// Reads from the body of the section whose header was read last, as read(2): writes to `count` how many bytes. Only
/// the section's owner knows where its body ends; `vfm_main_reader_footer` follows. Waits for a byte.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_main_reader_read(
    reader: Option<&MainReaderHandle>,
    data: *mut c_void,
    len: usize,
    count: Option<&mut MaybeUninit<usize>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let reader = given(reader, "reader: NULL")?;
        let count = given(count, "count: NULL")?;
        let room = room(data, len, "data: NULL")?;
        let mut reading = reader.lock()?;
        let lost = |error| {
            use vfio_migration::{Error, ErrorKind, Phase};
            Error::new(ErrorKind::Channel, Phase::Section).caused_by(error)
        };
        count.write(reading.reader.body()?.read(room).map_err(lost)?);
        Ok(())
    })
}

/// Reads the footer of the section whose body has been read with `vfm_main_reader_read` or by its owner.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_main_reader_footer(
    reader: Option<&MainReaderHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let mut reading = given(reader, "reader: NULL")?.lock()?;
        reading.section = None;
        reading.reader.footer()
    })
}

/// Frees a reader. Its input is the caller's. NULL is nothing. The thread that reads.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_main_reader_free(reader: Option<Box<MainReaderHandle>>) {
    quiet((), || drop(reader));
}

/// Writes a main channel. One thread at a time: a second is refused. Free it with `vfm_main_writer_free`.
pub struct MainWriterHandle(Mutex<Writer<Sink>>);

impl MainWriterHandle {
    pub(crate) fn lock(&self) -> Result<MutexGuard<'_, Writer<Sink>>> {
        lock_at_once(&self.0, "writer: another thread is in a call with it")
    }

    fn write(writer: Option<&Self>, event: &Event) -> Result<()> {
        given(writer, "writer: NULL")?.lock()?.write(event)
    }
}

/// Opens a main channel for writing, and writes its first eight bytes. `output` must be good until the writer is
/// freed. What stands in a section's body may be written to `output` itself. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_main_writer_open(
    output: Output,
    writer: Option<&mut MaybeUninit<*mut MainWriterHandle>>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let sink = Sink::new(output)?;
        let writer = given(writer, "writer: NULL")?;
        hand_out(writer, MainWriterHandle(Mutex::new(Writer::open(sink)?)));
        Ok(())
    })
}

/// Writes the machine's name, first of all: 255 bytes at most.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_main_writer_configuration(
    writer: Option<&MainWriterHandle>,
    machine: *const c_char,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let name = text(machine, "machine: NULL, or not UTF-8")?.to_owned();
        MainWriterHandle::write(writer, &Event::Configuration { name })
    })
}

/// Writes a section's header: of a device, or of another owner's. `kind` is an `enum vfm_section_kind`. The body follows
/// on the writer's output, then `vfm_main_writer_footer`. `vfm_outgoing_section` writes all three.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_main_writer_section(
    writer: Option<&MainWriterHandle>,
    kind: u32,
    id: u32,
    idstr: *const c_char,
    instance: u32,
    version: u32,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let section = Section {
            kind: section_kind(kind)?,
            id,
            owner: device_id(idstr, instance)?,
            version,
        };
        MainWriterHandle::write(writer, &Event::Section(section))
    })
}

/// Writes the footer of section `id`.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_main_writer_footer(
    writer: Option<&MainWriterHandle>,
    id: u32,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || given(writer, "writer: NULL")?.lock()?.footer(id))
}

/// Writes a command. OPEN_RETURN_PATH and SWITCHOVER_START have no payload, a PING has 4 bytes, big-endian; 65535 bytes
/// at most.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_main_writer_command(
    writer: Option<&MainWriterHandle>,
    command: u16,
    payload: *const c_void,
    len: usize,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let payload = bytes(payload, len, "payload: NULL")?.to_vec();
        let length = match command {
            VFM_COMMAND_OPEN_RETURN_PATH | VFM_COMMAND_SWITCHOVER_START => 0,
            VFM_COMMAND_PING => 4,
            _ => payload.len(),
        };
        if payload.len() != length {
            return Err(misuse("len: not this command's"));
        }
        let command = Command::Other { command, payload };
        MainWriterHandle::write(writer, &Event::Command(command))
    })
}

/// Writes the end of the VM's state, after `vfm_outgoing_finish` and never before: with it the destination may start the
/// VM.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_main_writer_eof(
    writer: Option<&MainWriterHandle>,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || MainWriterHandle::write(writer, &Event::Eof))
}

/// Writes the description that may follow the end: 1 MiB at most.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_main_writer_description(
    writer: Option<&MainWriterHandle>,
    json: *const c_void,
    len: usize,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let json = bytes(json, len, "json: NULL")?.to_vec();
        MainWriterHandle::write(writer, &Event::Description(json))
    })
}

/// Frees a writer. Its output is the caller's. NULL is nothing. The thread that writes.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_main_writer_free(writer: Option<Box<MainWriterHandle>>) {
    quiet((), || drop(writer));
}

/// A message on the return path.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct ReplyMessage {
    /// `VFM_REPLY_…`, or another number.
    pub kind: u16,
    /// SHUT: 0 where all is loaded. PONG: the PING's.
    pub value: u32,
    /// How long its payload is, where its kind has no name here.
    pub payload_len: usize,
    /// There was none: the path has ended.
    pub ended: bool,
}

/// Writes a message to the return path: `kind` is `VFM_REPLY_…`; `value` is SHUT's or PONG's. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_reply_write(
    output: Output,
    kind: u16,
    value: u32,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let reply = match kind {
            VFM_REPLY_SHUT => Reply::Shut(value),
            VFM_REPLY_PONG => Reply::Pong(value),
            VFM_REPLY_SWITCHOVER_ACK => Reply::SwitchoverAck,
            _ => return Err(misuse("kind: no reply's")),
        };
        reply.write(&mut Sink::new(output)?)
    })
}

/// Reads the next message of the return path, and no byte beyond it. The payload of one that has no name here is put into
/// `payload`, as much of it as `room` bytes hold; both may be 0. Waits for the bytes. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vfm_reply_read(
    input: Input,
    reply: Option<&mut MaybeUninit<ReplyMessage>>,
    payload: *mut c_void,
    room_len: usize,
    error: Option<&mut MaybeUninit<*mut ErrorHandle>>,
) -> Code {
    guard(error, || {
        let reply = given(reply, "reply: NULL")?;
        let room = room(payload, room_len, "payload: NULL")?;
        let mut told = ReplyMessage {
            kind: 0,
            value: 0,
            payload_len: 0,
            ended: false,
        };
        match Reply::read(&mut Source::new(input)?)? {
            None => told.ended = true,
            Some(Reply::Shut(value)) => (told.kind, told.value) = (VFM_REPLY_SHUT, value),
            Some(Reply::Pong(value)) => (told.kind, told.value) = (VFM_REPLY_PONG, value),
            Some(Reply::SwitchoverAck) => told.kind = VFM_REPLY_SWITCHOVER_ACK,
            Some(Reply::Other { kind, payload }) => {
                told.kind = kind;
                told.payload_len = payload.len();
                let count = payload.len().min(room.len());
                room[..count].copy_from_slice(&payload[..count]);
            }
            Some(_) => {}
        }
        reply.write(told);
        Ok(())
    })
}
