//! The container of the first stream: an Arrow batch with the identity of each row.
//!
//! A batch travels whole: [`RoundRobin`] deals batches to workers so that tokenizing is spread, and the
//! number of records at a time is the same on both sides. Within a process nothing is serialized; between
//! processes the rows go as Arrow IPC, padded to 8 bytes as timely asks.

use std::io::{Cursor, Write};
use std::sync::Arc;

use arrow::error::ArrowError;
use arrow::ipc::reader::StreamReader;
use arrow::ipc::writer::StreamWriter;
use arrow::record_batch::RecordBatch;
use timely::Accountable;
use timely::communication::Push;
use timely::dataflow::channels::pushers::exchange::Distributor;
use timely::dataflow::channels::{ContainerBytes, Message};
use timely::progress::Stamp;

use crate::document::{Document, DocumentId, Lease, RecordError};

/// Rows of one input and the rows next to them that could not be read.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    rows: Option<Arc<RecordBatch>>,
    ids: Vec<DocumentId>,
    rejected: Vec<RecordError>,
    /// Of the documents; what was rejected needs none.
    lease: Lease,
}

impl Batch {
    /// One id a row. The documents share the lease.
    pub fn new(rows: RecordBatch, ids: Vec<DocumentId>, rejected: Vec<RecordError>, lease: Lease) -> Self {
        assert_eq!(rows.num_rows(), ids.len(), "one id a row");
        Self { rows: Some(Arc::new(rows)), ids, rejected, lease }
    }

    /// Takes the batch apart, leaving it empty.
    pub fn drain(&mut self) -> impl Iterator<Item = Result<Document, RecordError>> + use<> {
        let rows = self.rows.take();
        let ids = std::mem::take(&mut self.ids);
        let lease = std::mem::take(&mut self.lease);
        let documents = ids.into_iter().enumerate().map(move |(index, id)| {
            let rows = rows.as_ref().expect("ids come with their rows");
            Ok(Document::new(id, Arc::clone(rows), index, lease.clone()))
        });
        documents.chain(std::mem::take(&mut self.rejected).into_iter().map(Err))
    }
}

impl Accountable for Batch {
    fn record_count(&self) -> i64 {
        (self.ids.len() + self.rejected.len()) as i64
    }
}

/// Deals whole batches to the workers in turn.
#[derive(Default)]
pub struct RoundRobin {
    next: usize,
}

impl Distributor<Batch> for RoundRobin {
    fn partition<T: Clone, P: Push<Message<T, Batch>>>(
        &mut self,
        batch: &mut Batch,
        stamp: &Stamp<T>,
        pushers: &mut [P],
    ) {
        if batch.record_count() > 0 {
            let worker = self.next % pushers.len();
            self.next = worker + 1;
            Message::push_at(batch, stamp.clone(), &mut pushers[worker]);
        }
    }

    fn flush<T: Clone, P: Push<Message<T, Batch>>>(&mut self, _stamp: &Stamp<T>, _pushers: &mut [P]) {}
}

impl ContainerBytes for Batch {
    fn from_bytes(bytes: timely::bytes::arc::Bytes) -> Self {
        let (len, bytes) = bytes.split_at(8);
        let len = u64::from_le_bytes(len.try_into().expect("eight bytes")) as usize;
        let (ids, rejected, rows): (Vec<DocumentId>, Vec<RecordError>, Option<Vec<u8>>) =
            serde_json::from_slice(&bytes[..len]).expect("a peer of the same version wrote this");
        let rows = rows.map(|rows| Arc::new(read_ipc(&rows).expect("a peer of the same version wrote this")));
        Self { rows, ids, rejected, lease: Lease::default() }
    }

    fn length_in_bytes(&self) -> usize {
        8 + self.encode().len().next_multiple_of(8)
    }

    fn into_bytes<W: Write>(&self, writer: &mut W) {
        let bytes = self.encode();
        let padding = bytes.len().next_multiple_of(8) - bytes.len();
        writer
            .write_all(&(bytes.len() as u64).to_le_bytes())
            .and_then(|()| writer.write_all(&bytes))
            .and_then(|()| writer.write_all(&[0; 8][..padding]))
            .expect("timely's buffers do not fail");
    }
}

impl Batch {
    fn encode(&self) -> Vec<u8> {
        let rows = self.rows.as_ref().map(|rows| write_ipc(rows).expect("a batch can be written as IPC"));
        serde_json::to_vec(&(&self.ids, &self.rejected, rows)).expect("plain data")
    }
}

/// One batch as an Arrow IPC stream.
pub(crate) fn write_ipc(rows: &RecordBatch) -> Result<Vec<u8>, ArrowError> {
    let mut bytes = Vec::new();
    let mut writer = StreamWriter::try_new(&mut bytes, &rows.schema())?;
    writer.write(rows)?;
    writer.finish()?;
    drop(writer);
    Ok(bytes)
}

/// The batch that [`write_ipc`] wrote.
pub(crate) fn read_ipc(bytes: &[u8]) -> Result<RecordBatch, ArrowError> {
    StreamReader::try_new(Cursor::new(bytes), None)?
        .next()
        .unwrap_or_else(|| Err(ArrowError::IpcError("no batch in the stream".to_owned())))
}

#[cfg(test)]
mod tests {
    use arrow::array::{Int64Array, ListArray, StringArray};
    use arrow::datatypes::Int32Type;

    use super::*;

    #[test]
    fn survives_the_way_between_processes() {
        let lists = ListArray::from_iter_primitive::<Int32Type, _, _>([Some(vec![Some(1), None]), None]);
        let rows = RecordBatch::try_from_iter([
            ("id", Arc::new(Int64Array::from(vec![7, 8])) as _),
            ("body", Arc::new(StringArray::from(vec![Some("a"), None])) as _),
            ("tags", Arc::new(lists) as _),
        ])
        .unwrap();
        let ids = vec![DocumentId { file: 0, row: 4 }, DocumentId { file: 0, row: 6 }];
        let mut batch = Batch::new(rows.clone(), ids.clone(), vec![], Lease::default());
        let mut bytes = Vec::new();
        batch.into_bytes(&mut bytes);
        assert_eq!(bytes.len(), batch.length_in_bytes());
        assert_eq!(bytes.len() % 8, 0);
        let mut arrived = Batch::from_bytes(timely::bytes::arc::BytesMut::from(bytes).freeze());
        assert_eq!(arrived.record_count(), batch.record_count());
        for (there, here) in arrived.drain().zip(batch.drain()) {
            let (there, here) = (there.unwrap(), here.unwrap());
            assert_eq!(there.id, here.id);
            let one = serde_json::to_vec(&there).unwrap();
            let one: Document = serde_json::from_slice(&one).unwrap();
            assert_eq!(one.batch().slice(one.index(), 1), here.batch().slice(here.index(), 1));
        }
    }
}
