//! What crosses a process border: names with their validation, the result and record formats, exit
//! codes. No input or output happens here.

pub mod names;

pub use names::{InvalidName, LoginName, NftId, VmName, WalletAddress};
