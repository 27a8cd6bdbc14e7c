//! Cache modes and what becomes of discards, by QEMU's names.

use clap::ValueEnum;

use crate::backend::Durability;
use crate::cli::target::Durable;
use crate::storage::open::{Caching, Flushing};

/// Which caches stand between a write and the medium, by QEMU's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum CacheMode {
    /// The host's page cache; a flush makes writes durable.
    #[default]
    Writeback,
    /// The host's page cache; every write is durable when it completes.
    Writethrough,
    /// No page cache (`O_DIRECT`).
    #[value(alias = "off")]
    None,
    /// No page cache, and every write is durable when it completes.
    Directsync,
    /// The host's page cache; a flush does nothing.
    Unsafe,
}

impl CacheMode {
    /// Whether the host's page cache is left out.
    pub fn direct(self) -> bool {
        matches!(self, Self::None | Self::Directsync)
    }

    /// Whether anybody relies on flushes.
    pub fn flushing(self) -> Flushing {
        match self {
            Self::Unsafe => Flushing::Waived,
            Self::Writeback | Self::Writethrough | Self::None | Self::Directsync => {
                Flushing::Needed
            }
        }
    }

    /// The caching it stands for, where it names one.
    pub fn caching(self) -> Option<Caching> {
        self.direct().then_some(Caching::Direct)
    }

    /// Whether what a command makes must be on stable media when it is done.
    pub fn durable(self) -> Durable {
        match self.durability() {
            Durability::Never => Durable::WhenReplacing,
            Durability::EveryWrite | Durability::OnFlush => Durable::Yes,
        }
    }

    /// How durable what is written is.
    pub fn durability(self) -> Durability {
        match self {
            Self::Writethrough | Self::Directsync => Durability::EveryWrite,
            Self::Writeback | Self::None => Durability::OnFlush,
            Self::Unsafe => Durability::Never,
        }
    }
}

/// How the host is asked, by QEMU's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AioMode {
    /// By threads.
    Threads,
    /// By the kernel's older interface.
    Native,
    /// By the kernel's newer interface.
    #[value(name = "io_uring")]
    IoUring,
}

/// What becomes of discards, by QEMU's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum DiscardMode {
    /// They give space back.
    #[default]
    #[value(alias = "on")]
    Unmap,
    /// They do nothing.
    #[value(alias = "off")]
    Ignore,
}
