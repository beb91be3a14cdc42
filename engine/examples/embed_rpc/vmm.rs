//! What the VMM of `embed_rpc.rs` has without the engine: connections over TLS with a certificate at each end, requests
//! and answers on one of them, and filters of system calls.

use std::{
    env::consts::ARCH,
    io::{self, Read, Write},
    os::unix::net::UnixStream,
};

use libc::c_long;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};
use vfio_migration::{
    Backend, Device, DeviceId, Error, ErrorKind, Phase, Result, TaskKind, TlsStream,
    migration::{DeviceSettings, MAX_MESSAGE_LEN, MigratableDevice},
    sim::{SimConfig, SimDevice, SimHandle, Stream},
    system_calls,
};

/// Its certificates, and what each end asks of the other's.
#[path = "../../tests/support/tls.rs"]
mod tls;

pub type AnyError = Box<dyn std::error::Error>;

/// A connection: the source's end, and the destination's. Each shows its certificate, and asks for the other's. The
/// handshake comes with the first bytes.
pub fn connect() -> Result<(TlsStream, TlsStream), AnyError> {
    let (near, far) = UnixStream::pair()?;
    let (client, server) = tls::configs();
    let near = TlsStream::client(near, client, tls::name())?;
    Ok((near, TlsStream::server(far, server)?))
}

/// The VMM's requests.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Request {
    /// The engine's control message.
    Devices,
    /// A part of the VM's memory.
    Memory,
    /// The state of all other devices, from which the destination makes its own.
    State,
    /// The VM is to run.
    Complete,
}

/// Sends a request, and waits for the answer: done, or failed.
pub fn ask(main: &mut (impl Read + Write), request: Request, body: &[u8]) -> io::Result<bool> {
    let len = u32::try_from(body.len()).expect("a request is short");
    main.write_all(&[&[request as u8][..], &len.to_be_bytes(), body].concat())?;
    let mut answer = [0];
    main.read_exact(&mut answer)?;
    Ok(answer[0] == 0)
}

/// Reads a request. None is longer than a control message.
pub fn next(main: &mut impl Read) -> io::Result<(Request, Vec<u8>)> {
    use Request::{Complete, Devices, Memory, State};
    let mut head = [0; 5];
    main.read_exact(&mut head)?;
    let [request, len @ ..] = head;
    let all = [Devices, Memory, State, Complete];
    let request = all.get(usize::from(request)).copied();
    let len = u32::from_be_bytes(len) as usize;
    let Some(request) = request.filter(|_| len <= MAX_MESSAGE_LEN) else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    let mut body = vec![0; len];
    main.read_exact(&mut body)?;
    Ok((request, body))
}

/// Answers the last request.
pub fn answer(main: &mut impl Write, done: bool) -> io::Result<()> {
    main.write_all(&[u8::from(!done)])
}

pub fn id(number: u32) -> Result<DeviceId> {
    Ok(DeviceId::new("0000:00:03.0/vfio", number)?)
}

/// Two devices. A VMM makes a `VfioDevice` with its `Hooks` here.
pub fn devices(seed: u64) -> Result<Vec<(MigratableDevice, SimHandle)>> {
    let device = |number| {
        let sim = SimDevice::new(SimConfig {
            seed: seed + u64::from(number),
            precopy_initial: 100_000,
            stream: Stream::Memfd, // without a thread of its own
            ..SimConfig::default()
        });
        let sim =
            sim.map_err(|error| Error::new(ErrorKind::Host, Phase::Setup).caused_by(error))?;
        let handle = sim.handle();
        let device = Device::new(id(number)?, Box::new(sim))?;
        let device = MigratableDevice::new(device, DeviceSettings::default());
        Ok((device, handle))
    };
    (0..2).map(device).collect()
}

macro_rules! calls {
    ($($name:ident)*) => { &[$(libc::$name),*] };
}

/// What this VMM's TLS calls, and its simulated devices.
const TLS: &[c_long] = calls! { SYS_sendto SYS_recvfrom SYS_read SYS_getrandom };
const SIMULATED: &[c_long] = calls! {
    SYS_memfd_create SYS_eventfd2 SYS_openat SYS_fstat SYS_statx SYS_lseek SYS_read SYS_pread64 SYS_pwrite64 SYS_ftruncate
    SYS_copy_file_range SYS_sendfile SYS_splice SYS_getrandom
};

/// Puts a filter on a thread of the engine's, before it works: the engine's own list of what it calls there, and what
/// the VMM's code calls that it runs. Anything else ends the process.
pub fn filtered(kind: &TaskKind) -> io::Result<()> {
    let own: &[&[c_long]] = match kind {
        // Its workers come to this function too, where io_uring is not to be had.
        TaskKind::Io => &[calls! { SYS_seccomp SYS_prctl }],
        TaskKind::Channel(_) | TaskKind::Close => &[TLS],
        TaskKind::Precopy => &[TLS, SIMULATED],
        TaskKind::Device(_) | TaskKind::State(_) => &[SIMULATED],
        _ => &[],
    };
    let calls = own.iter().copied().flatten();
    let calls = calls.chain(system_calls(kind.role(), Backend::Auto));
    let rules = calls.map(|call| (*call, Vec::new())).collect();
    let (kill, allow) = (SeccompAction::KillProcess, SeccompAction::Allow);
    let arch = ARCH.try_into().map_err(io::Error::other)?;
    let filter = SeccompFilter::new(rules, kill, allow, arch).map_err(io::Error::other)?;
    let filter: BpfProgram = filter.try_into().map_err(io::Error::other)?;
    apply_filter(&filter).map_err(io::Error::other)
}
