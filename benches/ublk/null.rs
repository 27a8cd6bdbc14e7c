//! A block device whose server answers each request at once and moves nothing: what the driver and
//! its ring cost alone, for `benches/ublk.sh`.
//!
//! Usage: `ublk-null QUEUES DEPTH user-copy|zero-copy`, until SIGTERM.

use std::cell::RefCell;
use std::io::Read;
use std::os::unix::net::UnixStream;

use io_uring::{IoUring, squeue};
use libublk::ctrl::{UblkCtrl, UblkCtrlBuilder};
use libublk::io::{BufDesc, BufDescList, UblkDev, UblkQueue, ublk_init_task_ring};
use libublk::{UblkError, UblkFlags, UblkIORes, sys};
use signal_hook::consts::SIGTERM;

const SIZE: u64 = 128 << 20;
const MAX_IO: u32 = 512 << 10;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [queues, depth, mode] = words.as_slice() else {
        return Err("usage: ublk-null QUEUES DEPTH user-copy|zero-copy".into());
    };
    let mut flags = sys::UBLK_F_USER_COPY;
    if mode == "zero-copy" {
        flags |= sys::UBLK_F_SUPPORT_ZERO_COPY | sys::UBLK_F_AUTO_BUF_REG;
    }
    let (mut stopped, stop) = UnixStream::pair()?;
    signal_hook::low_level::pipe::register(SIGTERM, stop)?;
    let control = UblkCtrlBuilder::default()
        .name("null")
        .nr_queues(queues.parse()?)
        .depth(depth.parse()?)
        .io_buf_bytes(MAX_IO)
        .ctrl_flags(flags.into())
        .dev_flags(UblkFlags::UBLK_DEV_F_ADD_DEV)
        .build()?;
    let id = i32::try_from(control.dev_info().dev_id)?;
    std::thread::spawn(move || {
        // Whatever ends the wait, the device is to go.
        let _ = stopped.read(&mut [0]);
        UblkCtrl::new_simple(id).and_then(|control| control.kill_dev())
    });
    control.run_target(
        |device: &mut UblkDev| {
            device.set_default_params(SIZE);
            Ok(())
        },
        |number, device: &UblkDev| {
            if let Err(e) = serve(number, device) {
                eprintln!("queue {number}: {e}");
            }
        },
        |control: &UblkCtrl| println!("{}", control.get_bdev_path()),
    )?;
    Ok(())
}

/// One queue, on a ring like those of `serve`.
fn serve(number: u16, device: &UblkDev) -> Result<(), UblkError> {
    let depth = device.dev_info.queue_depth;
    let entries = (u32::from(depth) * 2).next_power_of_two().max(64);
    let mut builder = IoUring::<squeue::Entry>::builder();
    builder.setup_cqsize(entries * 4);
    builder.setup_single_issuer().setup_defer_taskrun();
    let ring = builder.build(entries).map_err(UblkError::IOError)?;
    ublk_init_task_ring(|cell| {
        cell.set(RefCell::new(ring))
            .map_err(|_| UblkError::OtherError(-libc::EEXIST))
    })?;
    let registered: Vec<_> = (0..depth).map(registration).collect();
    let zero_copy = device.dev_info.flags & u64::from(sys::UBLK_F_AUTO_BUF_REG) != 0;
    let memory = match zero_copy {
        true => BufDescList::AutoRegs(&registered),
        false => BufDescList::Slices(None),
    };
    let queue = UblkQueue::new(number, device)?.submit_fetch_commands_unified(memory)?;
    queue.wait_and_handle_io(|queue, tag, _| {
        let sectors = queue.get_iod(tag).nr_sectors;
        let bytes = i32::try_from(sectors << 9).unwrap_or(i32::MAX);
        let memory = match zero_copy {
            true => BufDesc::AutoReg(registration(tag)),
            false => BufDesc::Slice(&[]),
        };
        let answer = Ok(UblkIORes::Result(bytes));
        if let Err(e) = queue.complete_io_cmd_unified(tag, memory, answer) {
            eprintln!("queue {number}: {e}");
        }
    });
    Ok(())
}

fn registration(tag: u16) -> sys::ublk_auto_buf_reg {
    sys::ublk_auto_buf_reg {
        index: tag,
        flags: u8::try_from(sys::UBLK_AUTO_BUF_REG_FALLBACK).unwrap_or_default(),
        ..Default::default()
    }
}
