//! The contract of a device: order, pinned memory, graphs, events.

use super::*;
use crate::gpu::device::DeviceError;
use crate::gpu::memory::PinnedVec;
use crate::gpu::ops::{RmsNorm, RowsOut, rms_norm};

#[test]
fn copies_go_there_and_back() {
    for device in devices() {
        assert!(!device.name().is_empty());
        let mut array = put(&device, &[1u32, 2, 3, 4, 5]);
        array.write(3, &[40, 50]).unwrap();
        let copied: DeviceVec<u32> = fresh(&device, 2);
        // SAFETY: both have two numbers.
        unsafe { device.copy(copied.address(), array.at(2), 8).unwrap() };
        assert_eq!(copied.read().unwrap(), [3, 40]);
        assert_eq!(array.read().unwrap(), [1, 2, 3, 40, 50]);
        assert_eq!(array.address().0 % 256, 0);
    }
}

#[test]
fn what_does_not_fit_is_an_error() {
    for device in devices() {
        let total = device.memory().unwrap().total;
        match device.alloc(2 * total as usize) {
            Err(DeviceError::OutOfMemory { wanted, total: all, .. }) => {
                assert_eq!((wanted, all), (2 * total, total));
            }
            other => panic!("{other:?}"),
        }
        // And the device goes on.
        assert_eq!(put(&device, &[7u8]).read().unwrap(), [7]);
    }
}

/// More events than are kept, waited for in any order, twice, or never.
#[test]
fn events_are_reached() {
    for device in devices() {
        let array: DeviceVec<u32> = fresh(&device, 1);
        let mut number = PinnedVec::<u32>::new(&device, 1).unwrap();
        assert_eq!(number.as_slice(), [0]);
        let mut events = Vec::new();
        for i in 0..300u32 {
            number.as_mut_slice()[0] = i;
            // SAFETY: one number, pinned, which lives until the wait below.
            unsafe { device.upload(array.address(), number.as_slice().as_ptr().cast(), 4).unwrap() };
            events.push(device.record().unwrap());
            if i % 3 == 0 {
                device.wait(events[i as usize]).unwrap();
                assert_eq!(array.read().unwrap(), [i]);
            }
            device.wait(*events.last().unwrap()).unwrap();
            device.wait(events[i as usize / 2]).unwrap();
        }
        for _ in 0..300 {
            device.record().unwrap();
        }
        device.wait(events[0]).unwrap();
    }
}

/// A step as the model does it: inputs from pinned memory, a kernel, a product, outputs to pinned memory.
#[test]
fn a_graph_does_again_what_was_recorded() {
    const SIZE: usize = 64;
    for device in devices() {
        let (stream, weight) = (fresh(&device, SIZE), put(&device, &[1.0f32; SIZE]));
        let dtype = HalfDtype::Bf16;
        let out = fresh_half(&device, dtype, SIZE);
        let mut input = PinnedVec::<f32>::new(&device, SIZE).unwrap();
        let output = PinnedVec::<u16>::new(&device, SIZE).unwrap();
        let step = || {
            let num_bytes = SIZE * 4;
            // SAFETY: as many numbers, pinned, which live until the last wait.
            unsafe { device.upload(stream.address(), input.as_slice().as_ptr().cast(), num_bytes).unwrap() };
            let args = RmsNorm {
                num_rows: 1,
                residual: &stream,
                delta: None,
                weight: &weight,
                post_norm: None,
                out: RowsOut::Half(&out),
                epsilon: 0.0,
            };
            rms_norm(&*device, &args).unwrap();
            let to = output.as_slice().as_ptr().cast_mut().cast();
            // SAFETY: as above.
            unsafe { device.download(to, out.address(), SIZE * 2).unwrap() };
        };
        // Once as it is, so that everything is loaded.
        step();
        device.begin_graph().unwrap();
        step();
        let graph = device.end_graph().unwrap();
        assert!(device.end_graph().is_err(), "none is recorded");
        for factor in 1..5 {
            let values: Vec<f32> = (0..SIZE).map(|i| (i * factor % 7) as f32).collect();
            device.wait(device.record().unwrap()).unwrap();
            input.as_mut_slice().copy_from_slice(&values);
            // SAFETY: everything that was recorded is alive.
            unsafe { device.launch_graph(graph).unwrap() };
            device.wait(device.record().unwrap()).unwrap();
            let mean = values.iter().map(|x| x * x).sum::<f32>() / SIZE as f32;
            let expected: Vec<f32> = values.iter().map(|x| x / mean.sqrt()).collect();
            let actual: Vec<f32> = output.as_slice().iter().map(|&bits| dtype.to_f32(bits)).collect();
            assert_close(&actual, &expected, tolerance(dtype), "graph");
        }
        device.drop_graph(graph);
        // SAFETY: it is refused.
        assert!(unsafe { device.launch_graph(graph) }.is_err());
    }
}

/// An engine has a thread of its own.
#[test]
fn a_device_goes_from_thread_to_thread() {
    for device in devices() {
        let array = put(&device, &[1u32, 2]);
        let array = std::thread::spawn(move || {
            let mut array = array;
            array.write(0, &[3]).unwrap();
            array
        });
        assert_eq!(array.join().unwrap().read().unwrap(), [3, 2]);
    }
}
