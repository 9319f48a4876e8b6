//! The daemon from outside: its configuration file, and its services through a socket.

mod common;
mod config;
mod dockerfile;
mod hostile;
mod policy;
mod service;
mod traces;
