//! rustls's own stream, which a VMM may have already, as a channel's. `TlsStream` makes fewer calls and copies.

use std::{io, io::Write, net::TcpStream, os::unix::net::UnixStream, time::Duration};

use rustls::{ClientConnection, ServerConnection, StreamOwned};

use super::{Channel, ChannelStream};
use crate::first_failure::Hangup;

macro_rules! rustls_stream {
    ($connection:ty, $socket:ty) => {
        impl ChannelStream for StreamOwned<$connection, $socket> {
            fn hangup(&self) -> io::Result<Hangup> {
                ChannelStream::hangup(&self.sock)
            }

            fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
                ChannelStream::set_timeout(&self.sock, timeout)
            }

            fn finish(&mut self) -> io::Result<()> {
                self.conn.send_close_notify();
                self.flush()?;
                ChannelStream::finish(&mut self.sock)
            }

            fn is_ended(&self) -> bool {
                ChannelStream::is_ended(&self.sock)
            }
        }

        impl From<StreamOwned<$connection, $socket>> for Channel {
            fn from(stream: StreamOwned<$connection, $socket>) -> Self {
                Self::new(stream)
            }
        }
    };
}

rustls_stream!(ClientConnection, TcpStream);
rustls_stream!(ClientConnection, UnixStream);
rustls_stream!(ServerConnection, TcpStream);
rustls_stream!(ServerConnection, UnixStream);
